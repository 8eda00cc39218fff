"""Moves what a model holds on its device into host memory and back, for models that take turns on one device.

The storages behind the tensors are emptied and filled again in place: the tensors stay the objects they were, so views
into flat buffers, hooks and compiled graphs do not notice. (DeepSpeed's own `offload_states` knows fewer optimizers.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor, UntypedStorage

from llmtrain.engine.clip import local
from llmtrain.parallel.pipeline import Pipeline


class Movable:
    """Moves an engine or frozen model, whose base class it is. Subclasses say in `held` what there is to move, and call
    `require_here` at the head of whatever reads or writes it."""

    pipeline: Pipeline | None
    device: torch.device  # where the model computes; what offloading keeps elsewhere is not moved
    host: Tensor | None = None  # the bytes of all storages, one after the other; kept for the next time
    away: list[tuple[UntypedStorage, int]] | None = None  # while it is on the host: every storage and its bytes
    emptied: Sequence[tuple[UntypedStorage, int]] = ()  # while it is on the host: the same of `scratch`

    def held(self) -> Iterable[Tensor]:
        """Returns the tensors that live between two calls; several may share a storage."""
        raise NotImplementedError

    def scratch(self) -> Iterable[Tensor]:
        """Returns tensors whose memory lives between two calls and whose values do not."""
        return ()

    def to_host(self) -> None:
        """See Scorer."""
        if self.away is not None:
            return
        moving, self.emptied = (list(storages(each, self.device)) for each in (self.held(), self.scratch()))
        total = sum(size for _, size in moving)
        if self.host is None or self.host.numel() != total:
            self.host = torch.empty(total, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        for part, (storage, _) in zip(_split(self.host, moving), moving, strict=True):
            part.copy_(_bytes(storage), non_blocking=True)
        _wait(self.device)
        for storage, _ in (*moving, *self.emptied):
            storage.resize_(0)
        self.away = moving
        if self.pipeline is not None:
            self.pipeline.release()

    def to_device(self) -> None:
        """See Scorer."""
        if self.away is None:
            return
        for storage, size in (*self.away, *self.emptied):
            storage.resize_(size)
        for part, (storage, _) in zip(_split(self.host, self.away), self.away, strict=True):
            _bytes(storage).copy_(part, non_blocking=True)
        _wait(self.device)
        self.away = None

    def require_here(self) -> None:
        """Raises RuntimeError while the model is on the host."""
        if self.away is not None:
            raise RuntimeError("this model waits on the host: call to_device() before it is used, saved or read")


def storages(tensors: Iterable[Tensor], device: torch.device) -> Iterator[tuple[UntypedStorage, int]]:
    """Yields every distinct storage on `device` with its size in bytes."""
    seen = set()
    for tensor in tensors:
        storage = local(tensor.detach()).untyped_storage()
        if storage.nbytes() and storage.device == device and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            yield storage, storage.nbytes()


def _split(host: Tensor, moving: list[tuple[UntypedStorage, int]]) -> Iterator[Tensor]:
    ends = list(accumulate(size for _, size in moving))
    return (host[end - size : end] for end, (_, size) in zip(ends, moving, strict=True))


def _bytes(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _wait(device: torch.device) -> None:
    """Waits for copies from and to pinned memory, which go on behind the program."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
