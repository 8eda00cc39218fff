"""Runs an evaluation beside training: in a thread of trainer 0, while rollout workers answer and the trainers go on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future

from llmtrain.checkpoint.group import CheckpointGroup
from llmtrain.eval.ranks import agreed

Measured = dict[str, float]
"""Maps the names of measures to their values."""


class Beside:
    """Holds the one evaluation that is under way. All trainers know of which step it is, trainer 0 what comes of it."""

    def __init__(self, group: CheckpointGroup) -> None:
        """`group` exchanges JSON between the trainers, and may wait as long as an evaluation takes."""
        self.group, self.step = group, None
        self.future: Future[Measured] = Future()
        self.told = False  # what came of it

    def begin(self, step: int, work: Callable[[], Measured]) -> None:
        """Begins `work`, which measures the weights after a step. The one before must be settled."""
        assert self.step is None, f"that of step {self.step} is not settled"
        self.step, self.told, self.future = step, False, Future()
        if self.group.rank == 0:  # a daemon: it must not hold up an end of the process for which nobody settles it
            threading.Thread(target=_run, args=(work, self.future), daemon=True).start()

    def found(self) -> dict[int, Measured]:
        """Returns what came of it, by its step, once; nothing where it goes on, has failed, or on another trainer."""
        if self.step is None or self.told or not self.future.done() or self.future.exception() is not None:
            return {}
        self.told = True
        return {self.step: self.future.result()}

    def settle(self) -> dict[int, Measured]:
        """Waits for the end of what is under way, if anything is; returns what `found` does (a collective). Raises on
        trainer 0 what it raised; the others end, see `agreed`."""
        if self.step is None:
            return {}
        agreed(self.group, lambda: self.future.result() if self.group.rank == 0 else None)
        found = self.found() if self.group.rank == 0 else {}
        self.step = None
        return found


def _run(work: Callable[[], Measured], future: Future[Measured]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:  # the trainer raises it
        future.set_exception(error)
