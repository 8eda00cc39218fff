"""Every rank goes on with the random state that it had."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from llmtrain.checkpoint.load import CheckpointReader
from llmtrain.checkpoint.rng import random_state
from llmtrain.checkpoint.save import take, write_checkpoint


def test_random_state_goes_on_where_it_was(tmp_path: Path, fake: SimpleNamespace) -> None:
    def draws() -> list:
        return [random.random(), random.gauss(0, 1), np.random.randn(), float(torch.randn(()))]

    draws()  # leaves a cached Gaussian in numpy and python
    path = fake.save(tmp_path, fake.tensors(), fake.Layout(), 1)[0]
    expected = [draws() for _ in range(3)]
    reader = CheckpointReader(path)
    assert reader.restore_rng(0)
    assert [draws() for _ in range(3)] == expected
    assert not reader.restore_rng(1)


def test_each_rank_goes_on_with_its_own_random_state(tmp_path: Path, fake: SimpleNamespace) -> None:
    tensors, layout, states, expected = fake.tensors(), fake.Layout(dp=2), [], []
    for rank in range(2):
        torch.manual_seed(rank)
        np.random.seed(rank)
        random.seed(rank)
        states.append(random_state())
        expected.append((random.random(), np.random.randn(), torch.randn(()).item()))

    def action(group: object) -> str:
        snapshot = replace(take(fake.FakeEngine(layout, group.rank, tensors), group.rank), random=states[group.rank])
        return write_checkpoint(str(tmp_path), lambda: snapshot, {"step": 1}, group, 1, fake.shapes(tensors))

    reader = CheckpointReader(fake.run_ranks(2, action)[0])
    for rank in (1, 0):
        assert reader.restore_rng(rank)
        assert (random.random(), np.random.randn(), torch.randn(()).item()) == expected[rank]
