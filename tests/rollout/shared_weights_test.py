"""Weights in memory without a name."""

from __future__ import annotations

import gc
import os
from contextlib import suppress

import pytest
import torch

from llmtrain.rollout.shared_weights import share, shared_tensors


def test_weights_come_in_the_dtype_of_the_sampling_model() -> None:
    given = {
        "a": torch.arange(6.0).view(2, 3) / 3,
        "b": torch.tensor(2.5),
        "count": torch.tensor([1, 2]),
        "turned": torch.arange(6.0).view(2, 3).t(),
    }
    shared = share(given.items(), 7, torch.bfloat16)
    assert shared.version == 7
    found = dict(shared_tensors(shared.head(), shared.file))
    assert list(found) == ["a", "b", "count", "turned"]
    for name in ("a", "b", "turned"):
        assert found[name].dtype == torch.bfloat16 and torch.equal(found[name], given[name].bfloat16())
    assert torch.equal(found["count"], given["count"])


def test_they_are_freed_with_their_holder() -> None:
    shared = share([("a", torch.ones(1000))], 0, torch.float32)
    file = shared.file
    assert os.fstat(file).st_size > 4000
    del shared
    gc.collect()
    with pytest.raises(OSError):
        os.fstat(file)


def weight_files() -> int:
    """Returns how many files of weights this process holds open; others' files may close at any time."""
    found = 0
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            found += "llmtrain-weights" in os.readlink(f"/proc/self/fd/{name}")
    return found


def test_a_failure_within_leaves_no_file() -> None:
    def weights():
        yield "a", torch.ones(3)
        raise FloatingPointError("not finite")

    gc.collect()
    before = weight_files()
    with pytest.raises(FloatingPointError):
        share(weights(), 0, torch.float32)
    assert weight_files() == before
