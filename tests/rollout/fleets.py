"""Provides sources that sample ahead with stub workers, whose answer to a prompt is its number."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal
from unittest.mock import patch

import psutil
import torch

from llmtrain.rollout.ahead import Ahead
from llmtrain.rollout.board import Limits
from llmtrain.rollout.fleet import Orders
from llmtrain.rollout.process import Program
from llmtrain.types import Prompt, Sampling
from tests.conftest import ROOT

STUB = Path(__file__).with_name("stub_worker.py")
ALONE = SimpleNamespace(rank=0, size=1, all_gather_json=lambda value: [value])
MESH = SimpleNamespace(**vars(ALONE), side_group=lambda timeout_s, ranks: ALONE)
PROMPTS = SimpleNamespace(
    at=lambda number, seed: number % 10, examples=[{"row": i} for i in range(10)], prompt_ids=lambda row: [row]
)
TWO = 2  # prompts a step, samples a prompt


@contextlib.contextmanager
def ahead(directory: Path, workers: int = 1, **given: Any) -> Iterator[Ahead]:
    """A source of `workers` stubs, as `source_of` makes it; at its end no process is left."""
    with patch.dict(os.environ, PYTHONPATH=str(ROOT)):  # a stub starts without site-packages
        source = source_of(directory, range(workers), **given)
        try:
            yield source
        finally:
            source.close()
            assert workers_of_this_process() == []


def source_of(
    directory: Path,
    workers: Iterable[int],
    mesh: Any = MESH,
    staleness: int = 1,
    steps: int = 10,
    deadline_s: float = 20.0,
    restarts: int = 1,
    verify: bool = False,
    inflight: Literal["finish", "continue", "restart"] = "finish",
    **settings: Any,
) -> Ahead:
    """A source that keeps these stubs, with these settings."""
    told = {"kind": "settings", "flag": str(directory / "flag"), "inflight": inflight, **settings}
    command = [sys.executable, "-S", str(STUB)]
    program = Program(command, dict.fromkeys(workers, told), str(directory), deadline_s)
    orders = Orders(program, lambda ns: [Prompt([n + 1, n + 2], n) for n in ns], Sampling(8, TWO), inflight, restarts)
    limits = Limits(TWO, staleness, steps, at_once=4, patience_s=2 * deadline_s + 5)
    return Ahead(mesh, PROMPTS, limits, orders, lambda groups: None, 0, torch.float32, 0, verify)


def workers_of_this_process() -> list[psutil.Process]:
    """The stubs that run."""
    return [p for p in psutil.Process(os.getpid()).children() if is_stub(p)]


def is_stub(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return str(STUB) in process.cmdline()
    return False


def publish(source: Ahead, version: int) -> None:
    source.publish([("w", torch.full((4,), float(version)))], version)


def train(source: Ahead, steps: int, first: int = 0) -> list[int]:
    """Takes the steps and returns the age of the oldest token of each; every prompt must come once, in its order."""
    ages = []
    for step in range(first, steps):
        groups = source.take(step)
        assert [[s.ids for s in group] for group in groups] == [
            [[n + 1, n + 2]] * TWO for n in range(TWO * step, TWO * step + TWO)
        ]
        assert [g[0].example for g in groups] == [{"row": n % 10} for n in range(TWO * step, TWO * step + TWO)]
        ages.append(max(step - v for g in groups for s in g for v in s.versions))
        publish(source, step + 1)
    return ages
