"""Hands weights to processes of the same machine: one copy in memory that has no name in any file system, so that
nothing is left of it when the processes that hold it are gone, however they end."""

from __future__ import annotations

import json
import mmap
import os
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmtrain.rollout.checksums import checksum
from llmtrain.rollout.generator import Weights

ALIGN = 64  # bytes: where a tensor may begin


@dataclass(frozen=True)
class Shared:
    """Holds the weights of a version, see memfd_create(2); they are freed when nobody holds this, or the file.

    The file holds the tensors one behind the other, and behind them as JSON name, dtype, shape and first byte of each.
    """

    version: int
    file: int  # descriptor
    index_at: int  # first byte of the JSON
    size_bytes: int
    checksums: dict[str, str] | None  # of all tensors, where workers are to compare them with what they hold

    def head(self) -> dict[str, Any]:
        """Returns the message that goes with the file."""
        place = {"version": self.version, "index_at": self.index_at, "bytes": self.size_bytes}
        return {"kind": "weights", **place, "verify": self.checksums is not None}


def share(weights: Weights, version: int, dtype: torch.dtype, verify: bool = False) -> Shared:
    """Writes weights, tensor by tensor: floating point in `dtype`, in which they are sampled from. Raises OSError where
    the memory does not suffice."""
    file, at, index = os.memfd_create("llmtrain-weights", os.MFD_CLOEXEC), 0, []
    sums: dict[str, str] = {}
    try:
        for name, tensor in weights:
            own = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
            index.append((name, str(own.dtype).removeprefix("torch."), list(own.shape), at))
            if verify:
                sums[name] = checksum(own)
            _write(file, memoryview(own.view(-1).view(torch.uint8).numpy()), at)
            at += -(-own.nbytes // ALIGN) * ALIGN
        text = json.dumps(index).encode()
        _write(file, memoryview(text), at)
    except BaseException:
        os.close(file)
        raise
    shared = Shared(version, file, at, at + len(text), sums if verify else None)
    weakref.finalize(shared, os.close, file)
    return shared


def shared_tensors(head: dict[str, Any], file: int) -> Iterator[tuple[str, Tensor]]:
    """Yields what `share` was given, as views of the memory of `file`; `head` is the message that came with it."""
    memory = mmap.mmap(file, 0, mmap.MAP_PRIVATE)
    for name, dtype, shape, at in json.loads(memory[head["index_at"] :]):
        count = torch.Size(shape).numel()
        yield name, torch.frombuffer(memory, dtype=getattr(torch, dtype), count=count, offset=at).view(shape)


def _write(file: int, data: memoryview, at: int) -> None:
    while data:
        written = os.pwrite(file, data, at)
        data, at = data[written:], at + written
