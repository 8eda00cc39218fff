"""Runs an evaluation beside training: in a thread of each trainer that keeps rollout workers, while these answer and
the trainers go on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait

from llmtrain.checkpoint.group import CheckpointGroup
from llmtrain.eval.ranks import agreed

Measured = dict[str, float]
"""Maps the names of measures to their values."""


class Beside:
    """Holds the one evaluation that is under way. All trainers know of which step it is, trainer 0 what comes of it."""

    def __init__(self, group: CheckpointGroup) -> None:
        """`group` exchanges JSON between the trainers, and may wait as long as an evaluation takes."""
        self.group, self.step = group, None
        self.future: Future[Measured | None] = Future()
        self.told = False  # what came of it

    def begin(self, step: int, work: Callable[[], Measured | None] | None) -> None:
        """Begins `work`, this trainer's part in measuring the weights after a step; None where it has none. What comes
        of that of trainer 0 counts. The one before must be settled."""
        assert self.step is None, f"that of step {self.step} is not settled"
        self.step, self.told, self.future = step, False, Future()
        if work is None:
            self.future.set_result(None)
        else:  # a daemon: it must not hold up an end of the process for which nobody settles it
            threading.Thread(target=_run, args=(work, self.future), daemon=True).start()

    def found(self) -> dict[int, Measured]:
        """Returns what came of it, by its step, once; nothing where it goes on, has failed, or on another trainer."""
        if self.group.rank or self.step is None or self.told:
            return {}
        if not self.future.done() or self.future.exception() is not None:
            return {}
        self.told = True
        return {self.step: self.future.result()}

    def settle(self) -> dict[int, Measured]:
        """Waits for the end of what is under way, if anything is; returns what `found` does (a collective). Raises on
        trainer 0 what it raised; the others end, see `agreed`."""
        if self.step is None:
            return {}
        wait([self.future])
        agreed(self.group, lambda: self.future.result() if self.group.rank == 0 else None)
        found = self.found()
        self.step = None
        return found


def _run(work: Callable[[], Measured | None], future: Future[Measured | None]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:  # the trainer raises it
        future.set_exception(error)
