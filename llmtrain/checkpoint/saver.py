"""Saves the checkpoints of one run, in the foreground or in the background, and handles saves that fail."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType

import numpy as np
import torch

from llmtrain.checkpoint.files import as_array
from llmtrain.checkpoint.group import CheckpointGroup
from llmtrain.checkpoint.save import Shapes, Snapshot, take, write_checkpoint
from llmtrain.config.schema import CheckpointConfig
from llmtrain.engine.base import Engine

GRACE_S = 10  # how long a run that fails for another reason waits for the save in flight

GOES_ON = "untouched and the run goes on (checkpoint.on_error=stop would end it)"
AT_END = "untouched, and the run ends here; the same command goes on from them"

logger = logging.getLogger(__name__)


class HostBuffer:
    """Holds host memory for one copy of what a rank owns, allocated once for all saves."""

    def __init__(self, engine: Engine) -> None:
        tensors = [tensor for fragment in engine.fragments() for tensor in fragment.tensors.values()]
        self.pinned = any(tensor.is_cuda for tensor in tensors)
        # Filled, so that its pages exist: else the first save would create them, at ten times the cost of a copy.
        self.memory = torch.empty(sum(tensor.numel() for tensor in tensors), pin_memory=self.pinned).fill_(0)

    def take(self, engine: Engine, rank: int) -> Snapshot:
        """Returns `save.take` with copied tensors, which stay valid until the next call."""
        live = take(engine, rank)
        parts = self.memory.split([tensor.numel() for tensor in live.tensors.values()])
        held = dict(zip(live.tensors, parts, strict=True))
        if self.pinned:
            for name, tensor in live.tensors.items():
                held[name].copy_(tensor, non_blocking=True)
            torch.cuda.synchronize()
        else:
            pairs = [(held[name].numpy(), as_array(tensor)) for name, tensor in live.tensors.items()]
            copy_all(pairs, torch.get_num_threads())
        return replace(live, tensors=held)


def copy_all(pairs: Sequence[tuple[np.ndarray, np.ndarray]], threads: int) -> None:
    """Copies each second array into the first, both flat; every thread copies an equal share of the elements.

    (A `copy_` of each would synchronise torch's threads at every tensor, which is slow where other processes use the
    cores.)
    """
    total = sum(source.size for _, source in pairs)

    def share(thread: int) -> None:
        first, last, at = total * thread // threads, total * (thread + 1) // threads, 0
        for target, source in pairs:
            begin, end = max(first - at, 0), min(last - at, source.size)
            if begin < end:
                np.copyto(target[begin:end], source[begin:end])
            at += source.size

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(share, range(threads)))


class Saver:
    """Saves one engine, or several as one (checkpoint.roles), into one directory; all methods but `failed` are
    collectives over the ranks of `group`.

    With `background` a save only copies the state (`HostBuffer`); a thread writes it while training continues, and
    communicates through `group`, which training must then not use. At most one save is in flight: the next waits for
    it. Use it as a context manager: when the run fails, the save in flight gets GRACE_S to finish.
    """

    def __init__(
        self, directory: str, engine: Engine, shapes: Shapes, settings: CheckpointConfig, group: CheckpointGroup
    ) -> None:
        self.directory, self.engine, self.shapes = directory, engine, shapes
        self.settings, self.group = settings, group
        self.buffer = HostBuffer(engine) if settings.background else None
        self.in_flight: threading.Thread | None = None
        self.error: Exception | None = None  # error of the last save
        self.last = False

    def save(self, state: dict, last: bool = False) -> None:
        """Saves the state as it is now. Raises as `wait` does, in the foreground for this save, else for the one
        before. The `last` save of a run must not be lost: its error is raised whatever `on_error` says."""
        self.wait()
        self.last = last
        if self.buffer is None:
            self._write(lambda: take(self.engine, self.group.rank), state)
            self.wait()
            return
        self.in_flight = threading.Thread(target=self._write, args=(self._copied(), state), daemon=True)
        self.in_flight.start()

    def wait(self) -> None:
        """Waits until no save is in flight. Raises its error unless the run goes on (`on_error`; not at its end)."""
        if self.in_flight is not None:
            self.in_flight.join()
            self.in_flight = None
        if self.error is not None and not self._tolerated(self.error):
            raise self.error

    def close(self) -> None:
        """Waits for the last save of a run. Raises its error."""
        self.wait()
        if self.error is not None:
            raise self.error

    @property
    def failed(self) -> bool:
        """Returns whether this rank knows of an error that `wait` will raise; the other ranks may learn of it a moment
        later."""
        return self.error is not None and not self._tolerated(self.error)

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.in_flight is not None:
            self.in_flight.join(GRACE_S)

    def _tolerated(self, error: Exception) -> bool:
        """Returns whether the run goes on after this error: a disk may recover, any other error would occur again."""
        return isinstance(error, OSError) and self.settings.on_error == "warn" and not self.last

    def _copied(self) -> Callable[[], Snapshot]:
        """Returns a function that returns the copy, or raises the error of copying within the save, where all ranks see
        it."""
        copied: Future[Snapshot] = Future()
        try:
            copied.set_result(self.buffer.take(self.engine, self.group.rank))
        except Exception as error:
            copied.set_exception(error)
        return copied.result

    def _write(self, snapshot: Callable[[], Snapshot], state: dict) -> None:
        self.error = None
        try:
            write_checkpoint(self.directory, snapshot, state, self.group, self.settings.keep, self.shapes)
        except Exception as error:
            self.error = error
            if self.group.rank == 0 and (self.last or self._tolerated(error)):
                end = AT_END if self.last else GOES_ON
                logger.warning("step %d was not saved: %s; the checkpoints before it are %s", state["step"], error, end)
