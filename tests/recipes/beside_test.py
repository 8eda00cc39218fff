"""A run that is evaluated beside its training is the run that is not, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

WORKER = Path(__file__).parents[1] / "several_runs.py"
EVERY = ("eval.every_steps=2", "eval.problems=3", "eval.samples=2", "eval.text_seqs=5")


def states(run: Path) -> dict[str, bytes]:
    """The tensors and random streams of all checkpoints."""
    return {
        str(path.relative_to(run)): path.read_bytes()
        for path in sorted(run.glob("checkpoints/step-*/rank-*"))
        if path.suffix in (".json", ".safetensors")
    }


def evaluated(run: Path) -> dict[int, dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: {name: v for name, v in line.items() if name.startswith("eval/")} for line in lines}
    return {step: each for step, each in found.items() if each}


def both(forked: Callable, ranks: int, small: Path, directory: Path, recipe: str, *keys: str) -> tuple[Path, Path]:
    """Runs a recipe without and with evaluations, the second in two parts."""
    plain, beside = directory / "plain", directory / "beside"
    runs = [
        [recipe, str(small), f"run_dir={plain}", *keys],
        [recipe, str(small), f"run_dir={beside}", *keys, *EVERY, "train.steps=3", "optim.schedule=constant"],
        [recipe, str(small), f"run_dir={beside}", *keys, *EVERY],
    ]
    done = forked(ranks, WORKER, json.dumps(runs), timeout_s=200)
    assert "exit codes [0, 0, 0]" in done.stdout, done.stdout[-3000:]
    return plain, beside


def test_pretraining_is_not_changed(small: Path, tmp_path: Path, forked: Callable) -> None:
    keys = ("train.steps=5", "optim.schedule=constant")
    plain, beside = both(forked, 1, small, tmp_path, "pretrain", *keys)
    assert len(states(plain)) == 2 * 2 and states(beside) == states(plain)
    found = evaluated(beside)
    assert list(found) == [0, 2, 3, 4, 5]  # 3: the end of the first part
    assert all(set(each) > {"eval/loss", "eval/pass@1", "eval/pass@2"} for each in found.values())
    held_out = [json.loads(line) for line in (beside / "evaluations.jsonl").read_text().splitlines()]
    assert evaluated(plain) == {} and held_out[0]["step"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "keys"),
    [
        ("grpo", ["rewards=[{name: first_integer}]", "rollout.workers=1", "rollout.placement=separate"]),
        ("grpo", ["rewards=[{name: first_integer}]"]),
        ("sft", ["engine.backend=fsdp"]),
    ],
)
def test_other_recipes_are_not_changed_on_two_ranks(
    small: Path, tmp_path: Path, recipe: str, keys: list[str], forked: Callable
) -> None:
    start = tmp_path / "start"
    first = [["pretrain", str(small), f"run_dir={start}", "train.steps=2"]]
    assert forked(1, WORKER, json.dumps(first)).returncode == 0
    own = ("train.steps=5", "optim.schedule=constant", f"model.init_from={start}", *keys)
    plain, beside = both(forked, 2, small, tmp_path, recipe, *own)
    assert states(beside) == states(plain) != {}
    assert list(evaluated(beside)) == [0, 2, 3, 4, 5]
