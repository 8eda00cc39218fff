"""Warnings where work is wasted, each once."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llmtrain.config.recipes import RECIPES
from llmtrain.config.schema import Config, DataConfig, OptimConfig, TrainConfig
from llmtrain.observe.metrics import read_lines
from llmtrain.trainer.waste import Waste, note_padding, schedule_waste
from llmtrain.types import Batch
from tests.forked import run_alone


def job(directory: Path, warmup_steps: int = 1, updates: int = 100, rank: int = 0) -> SimpleNamespace:
    engine = SimpleNamespace(optim=OptimConfig(warmup_steps=warmup_steps), total_steps=updates)
    config = Config(run_dir=str(directory))
    mesh, recipe = SimpleNamespace(rank=rank, sizes={"pp": 1}), RECIPES["sft"]
    return SimpleNamespace(config=config, mesh=mesh, recipe=recipe, engines={"policy": engine}, step=0, padding=0.0)


def told(directory: Path) -> list[tuple[int, str]]:
    path = directory / "events.jsonl"
    return [(line["step"], line["about"]) for line in read_lines(str(path))] if path.exists() else []


def steps(waste: Waste, kept: list[float]) -> None:
    for fraction in kept:
        waste.job.step += 1
        waste.look({"kept_fraction": fraction})


def test_groups_without_a_spread_are_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    waste = Waste(job(tmp_path))
    steps(waste, [0.0] * 9 + [0.1] + [0.0] * 9)
    assert told(tmp_path) == []
    steps(waste, [0.0] + [0.5] + [0.0] * 20)
    assert told(tmp_path) == [(20, "groups")]
    assert capsys.readouterr().err.startswith("step 20: no group of the last 10 steps has a spread of rewards")
    steps(Waste(job(tmp_path)), [0.0] * 10)  # a run that goes on
    assert told(tmp_path) == [(20, "groups")]
    steps(Waste(job(tmp_path / "other", rank=1)), [0.0] * 10)  # the directory is rank 0's to make
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("warmup_steps", "updates", "schedule", "about"),
    [
        (100, 100, "cosine", ["peak"]),
        (101, 100, "constant", ["peak"]),
        (99, 100, "wsd", ["decay"]),
        (99, 100, "constant", []),
        (98, 100, "cosine", []),
        (0, 1, "linear", ["decay"]),
    ],
)
def test_a_schedule_that_is_cut_off(warmup_steps: int, updates: int, schedule: str, about: list[str]) -> None:
    optim = OptimConfig(warmup_steps=warmup_steps, schedule=schedule)
    assert [name for name, _ in schedule_waste(optim, updates)] == about


def test_padding_is_told_above_a_half(tmp_path: Path) -> None:
    def batch(padded: int) -> Batch:
        segments = torch.tensor([[0] * (8 - padded) + [-1] * padded])
        return Batch(*[torch.zeros(1, 8, dtype=torch.long)] * 4, segment_ids=segments)

    waste = Waste(job(tmp_path))
    for padded in ([4, 4], [2, 6]):
        note_padding(waste.job, [batch(n) for n in padded])
        waste.look({})
    assert waste.job.padding == 0.5 and told(tmp_path) == []
    note_padding(waste.job, [batch(4), batch(5)])
    waste.look({})
    waste.look({})
    assert told(tmp_path) == [(0, "padding")]


@pytest.mark.parametrize(
    ("recipe", "more", "pp", "remedy"),
    [
        ("sft", {}, 1, "set train.micro_batch_tokens"),
        ("sft", {"train": TrainConfig(micro_batch_tokens=4096)}, 1, "take more rows or prompts a step"),
        ("grpo", {}, 1, "take more rows or prompts a step"),
        ("grpo", {"data": DataConfig(replay_seqs=2)}, 1, "take more rows or prompts a step"),
        ("sft", {"data": DataConfig(replay_seqs=2)}, 2, "with data.replay_seqs rows in a pipeline have train.seq_len"),
    ],
)
def test_the_remedy_is_one_that_helps(
    recipe: str, more: dict, pp: int, remedy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    padded = job(tmp_path)
    padded.config, padded.recipe = padded.config.model_copy(update=more), RECIPES[recipe]
    padded.mesh.sizes["pp"], padded.padding = pp, 0.75
    Waste(padded).look({})
    assert f"75% of the tokens in the microbatches of a step are padding: {remedy}" in capsys.readouterr().err


def test_a_run_tells_of_itself(small: Path, tmp_path: Path) -> None:
    """Rows of 64 tokens, each with one short problem; six updates of which six warm up."""
    run, base = tmp_path / "run", tmp_path / "base"
    made = run_alone("llmtrain", "pretrain", small, f"run_dir={base}", "train.steps=1", "train.eval_seqs=1")
    assert made.returncode == 0 and told(base) == [(0, "peak")], made.stdout[-2000:]
    options = (f"model.init_from={base}", "optim.warmup_steps=6", "train.seq_len=256", "train.steps=6")
    done = run_alone("llmtrain", "sft", small, f"run_dir={run}", *options, "train.micro_batch_seqs=8")
    assert done.returncode == 0, done.stdout[-2000:]
    assert told(run)[0] == (0, "peak")
    assert done.stdout.count("the learning rate rises in all 6 updates of the run") == 1
