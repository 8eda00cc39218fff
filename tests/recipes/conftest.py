"""Provides a job of one process, whose engine and loop are stubs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llmtrain.arch.resolve import resolve_model
from llmtrain.checkpoint.roles import MAIN
from llmtrain.config.load import load
from llmtrain.config.recipes import RECIPES
from llmtrain.config.schema import ParallelConfig
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.parallel.mesh import Mesh, init_mesh, shutdown
from llmtrain.trainer.job import Job
from tests.recipes.stubs import StubEngine, shifted


@pytest.fixture(scope="module")
def one_rank() -> Iterator[Mesh]:
    """Returns the mesh of a job of one process, this one."""
    yield init_mesh(ParallelConfig(), None, 60)
    shutdown()


@pytest.fixture
def stub_job(small: Path, small_data: Path, tmp_path: Path, one_rank: Mesh) -> Callable[..., Job]:
    """Provides stub_job(recipe, *overrides) -> a job with a StubEngine, in the directory tmp_path/run."""

    def make(recipe: str, *overrides: str) -> Job:
        config = load(str(small), [f"run_dir={tmp_path / 'run'}", "rollout.verify=off", *overrides])
        (tmp_path / "run").mkdir(exist_ok=True)
        tokenizer = load_tokenizer(str(small_data / "tokenizer"))
        job = Job(config, RECIPES[recipe], resolve_model(config.model), one_rank, tokenizer, watch=None)
        job.engines[MAIN] = StubEngine(shifted(0.0))
        return job

    return make


def run_steps(steps: list[tuple[dict[str, float], int]]) -> Callable:
    """Returns a loop in the place of `trainer.loop.train` that keeps what each step returns."""

    def train(job: Job, step: Callable[[int], tuple[dict[str, float], int]]) -> None:
        while job.step < job.config.train.steps:
            steps.append(step(job.step))
            job.step += 1

    return train
