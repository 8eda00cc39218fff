"""What the benchmark of sampling ahead starts, and how it reads the runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.asynchronous import AHEAD, CONTESTANTS, FIRST, measured, run, start, summary
from llmtrain.config.load import load
from llmtrain.rules.check import violations


def lines(step_s: float, steps: int = 8) -> list[dict[str, float]]:
    """The first steps take a minute; rewards are 0.1, 0.2, ..."""
    return [
        {"step": i + 1, "step_s": 60.0 if i < FIRST else step_s, "reward_mean": (i + 1) / 10, "rollout_s": 1.0}
        for i in range(steps)
    ]


def test_a_run_is_read_behind_its_first_steps() -> None:
    found = measured(lines(2.0))
    assert found == {"step_s": 2.0, "reward": pytest.approx(0.65), "first_reward": 0.25, "rollout_s": 1.0}


def test_the_ratio_is_that_of_each_seed() -> None:
    in_step, *_ = CONTESTANTS
    runs = {
        in_step: [measured(lines(s)) for s in (3.0, 4.0, 8.0)],
        AHEAD: [measured(lines(s)) for s in (2.0, 2.0, 2.0)],
    }
    found = summary(runs)
    assert found[in_step]["ratios"] == [1.5, 2.0, 4.0] and found[in_step]["ahead_ratio"] == 2.0
    assert found[in_step]["step_s"] == 5.0 and found[AHEAD]["ahead_ratio"] == 1.0


@pytest.mark.parametrize("name", CONTESTANTS)
def test_what_is_started_is_allowed(name: str, small: Path, small_data: Path) -> None:
    ranks, _ = CONTESTANTS[name]
    command = start(small, Path("there"), name, seed=2, steps=8)
    config = load(str(small), [*command[command.index(str(small)) + 1 :], f"model.init_from={small_data}"])
    assert (config.seed, config.train.steps, config.run_dir) == (2, 8, "there")
    assert [line for line in violations(config, ranks, "grpo") if line.startswith(("rollout.", "engine."))] == []
    assert (f"--nproc-per-node={ranks}" in command) == (ranks > 1)


def test_a_run_that_is_there_is_not_repeated(tmp_path: Path) -> None:
    place = tmp_path / "2-7"
    place.mkdir()
    (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines(2.0)))
    assert run(tmp_path / "no.yaml", tmp_path, AHEAD, 7, steps=8) == lines(2.0)
