"""A rank that dies by SIGKILL in the middle of a save, with real processes over gloo."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from llmtrain.checkpoint import manifest
from llmtrain.checkpoint import save as save_module
from llmtrain.checkpoint.load import CheckpointReader
from llmtrain.checkpoint.manifest import newest_intact
from llmtrain.checkpoint.save import save_checkpoint
from tests.forked import CONTEXT

HELPERS = Path(__file__).parent / "conftest.py"


class GlooGroup:
    """The default process group."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def all_gather_json(self, value: object) -> list:
        text = json.dumps(value).encode()
        rows = [torch.zeros(1 << 14, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(rows, torch.frombuffer(bytearray(text.ljust(1 << 14)), dtype=torch.uint8))
        return [json.loads(bytes(row.tolist())) for row in rows]


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def half_a_file(tensors: dict[str, torch.Tensor]) -> Iterator[bytes | np.ndarray]:
    chunks = CHUNKS(tensors)
    yield next(chunks)
    yield next(chunks)
    die()


def after_fragments(path: str, chunks: object) -> dict:
    entry = WRITE(path, chunks)
    return die() if path.endswith("rank-00001.safetensors") else entry


def after_manifest(path: str, files: dict) -> None:
    manifest.write_manifest(path, files)
    die()


CHUNKS, WRITE = save_module.safetensors_chunks, save_module.write_durably
POINTS = {  # where -> (rank, what is replaced, by what)
    "half a fragment file": (1, "safetensors_chunks", half_a_file),
    "after the fragments": (1, "write_durably", after_fragments),
    "before the manifest": (0, "write_manifest", die),
    "before the rename": (0, "write_manifest", after_manifest),
    "before the old ones go": (0, "_prune", die),
}


def one_rank(rank: int, store: str, directory: str, step: int, point: str | None) -> None:
    spec = importlib.util.spec_from_file_location("checkpoint_helpers", HELPERS)
    helpers = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = helpers
    spec.loader.exec_module(helpers)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=20)
    )
    if point is not None and POINTS[point][0] == rank:
        setattr(save_module, POINTS[point][1], POINTS[point][2])
    tensors = helpers.make_tensors(seed=step)
    engine = helpers.FakeEngine(helpers.Layout(tp=2), rank, tensors)
    save_checkpoint(directory, engine, {"step": step}, GlooGroup(), 1, helpers.shapes_of(tensors))
    os._exit(0)


def save_on_two(tmp_path: Path, step: int, point: str | None) -> list[int]:
    """Exit codes of both ranks."""
    store = tmp_path / f"store-{step}-{point is None}"
    args = (str(store), str(tmp_path / "checkpoints"), step, point)
    ranks = [CONTEXT.Process(target=one_rank, args=(rank, *args)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    return [process.exitcode for process in ranks]


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_during_the_save_leaves_a_usable_checkpoint(tmp_path: Path, point: str) -> None:
    directory = str(tmp_path / "checkpoints")
    assert save_on_two(tmp_path, 1, None) == [0, 0]
    victim = POINTS[point][0]
    codes = save_on_two(tmp_path, 2, point)
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] not in (0, None)  # the other one noticed, and did not hang
    step = 2 if point == "before the old ones go" else 1
    assert CheckpointReader(newest_intact(directory)).state == {"step": step}
    assert save_on_two(tmp_path, 2, None) == [0, 0]
    assert os.listdir(directory) == ["step-00000002"]
    assert CheckpointReader(newest_intact(directory)).state == {"step": 2}
