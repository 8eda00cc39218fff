"""Decides which prompt is sampled when, by whom and with which weights, while others are trained on.

Prompts have numbers, and steps take them in this order. A prompt is begun only when the newest weights can be at most
`max_staleness` steps old at the step that takes it, so that nothing has to be thrown away for its age. Where none may
be begun, workers answer a question that was asked beside. One lock guards all; the trainer, a thread for each worker
and who asks share it. On several machines the first trainer of each has a board, and a share of the prompts.
"""

from __future__ import annotations

import math
import operator
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field

from llmtrain.observe.log import log
from llmtrain.rollout.question import Question
from llmtrain.rollout.shared_weights import Shared
from llmtrain.types import Group


class WorkersFail(RuntimeError):
    """Says that nobody is left who samples."""


class Closed(Exception):
    """Says that nothing more is wanted."""


@dataclass(frozen=True)
class Limits:
    """Says how far ahead prompts are sampled.

    Example: Limits(prompts_per_step=32, max_staleness=1, steps=64, at_once=32, patience_s=1200)
    """

    prompts_per_step: int  # that a step takes at least
    max_staleness: int  # steps between the weights that begin a sample and those of the step that takes it
    steps: int  # of the run: nothing is sampled for later ones
    at_once: int  # prompts that one worker is given at most
    patience_s: float  # without any news from a worker; longer is a fault of this program


@dataclass(frozen=True)
class Task:
    """Holds prompts that a worker has begun, with the newest weights of that moment; or places of a question, with its
    weights."""

    numbers: list[int]
    weights: Shared
    question: Question | None = None


@dataclass
class Counts:
    """Counts what has happened since the last step."""

    begun: int = 0  # prompts
    given_back: int = 0  # prompts of workers that failed
    rejected: int = 0  # samples that were begun again under newer weights
    rest_s: float = 0.0  # of all workers, ready and without a prompt
    load_s: float = 0.0  # of all workers, loading weights
    loaded_bytes: int = 0  # by all workers

    def __add__(self, other: Counts) -> Counts:
        return Counts(*map(operator.add, astuple(self), astuple(other)))


@dataclass
class Board:
    """Holds the state of the prompts of one trainer's workers, from `next` on: being sampled, done, or not begun.

    Example: b = Board(limits, next=0, live={0}); b.publish(weights); b.begin(0, wait_s=1) is a Task of its first
    prompts; b.finish(0, groups); b.ask(range(32)); b.take(range(32)).
    """

    limits: Limits
    next: int  # lowest number that no step has asked for
    live: set[int]  # workers that may still sample
    rank: int = 0  # of the trainer that keeps them
    owners: Sequence[int] = (0,)  # prompt n is for the workers of rank owners[n % len(owners)]
    fresh: int = -1  # lowest number that nobody was dealt
    weights: Shared | None = None
    asked: bool = False  # the step that trains the newest weights has its first prompts
    closed: bool = False
    error: Exception | None = None  # why the run must stop
    last_fault: str = ""  # of a worker
    open: set[int] = field(default_factory=set)  # may be begun: dealt, or given back by workers that failed
    under_way: dict[int, int] = field(default_factory=dict)  # number -> worker
    done: dict[int, Group] = field(default_factory=dict)
    question: Question | None = None  # that is asked beside
    resting: dict[int, float] = field(default_factory=dict)  # worker -> since when
    counts: Counts = field(default_factory=Counts)

    def __post_init__(self) -> None:
        self.fresh = self.next
        self.changed = threading.Condition()

    def publish(self, weights: Shared) -> None:
        """Makes these the newest weights."""
        with self.changed:
            self.weights, self.asked = weights, False
            self.changed.notify_all()

    def newest(self) -> Shared | None:
        """Returns the newest weights. Raises Closed."""
        if self.closed:
            raise Closed
        return self.weights

    def begin(self, worker: int, wait_s: float) -> Task | None:
        """Returns a share of the prompts that may be begun now, as a task of this worker, else of a question; None when
        there are none for so long. Raises Closed."""
        with self.changed:
            self.resting.setdefault(worker, time.monotonic())
            self.changed.wait_for(lambda: self.closed or self._opened() or self._posed(), wait_s)
            if self.closed:
                raise Closed
            if numbers := self._opened():
                return self._begun(worker, self._share(sorted(numbers), self.limits.at_once))
            question = self.question
            if question is None or not question.open:
                return None
            mine = self._share(question.open, question.at_once)
            question.begin(mine, worker)
            self._works(worker)
            return Task(mine, question.weights, question)

    def finish(self, worker: int, groups: Mapping[int, Group], question: Question | None = None) -> None:
        """Takes what a worker made of its task, of a question where that is given."""
        with self.changed:
            if question is not None:
                question.finish(groups)
            else:
                for number in groups:
                    assert self.under_way.pop(number) == worker
                self.done |= groups
            self.changed.notify_all()

    def answers(self, question: Question) -> dict[int, Group]:
        """Returns the groups of a question, by their places, once workers that had nothing to sample for a step have
        answered it, or none is left who samples; the only one at this time, and for another thread than the trainer's.
        Raises Closed, and as `take` does."""
        with self.changed:
            assert self.question is None, "one question at a time"
            self.question = question
            self.changed.notify_all()
            try:
                while self.live and not question.answered:
                    self._await_news()
            finally:
                self.question = None
            return question.done

    def fail(self, worker: int, reason: str, starts_left: int) -> None:
        """Gives the prompts of a worker that failed to others, and drops it when it is not started again."""
        with self.changed:
            lost = [number for number, who in self.under_way.items() if who == worker]
            self.open |= set(lost)
            self.last_fault = reason
            self.under_way = {number: who for number, who in self.under_way.items() if who != worker}
            self.resting.pop(worker, None)
            self.counts.given_back += len(lost)
            beside = self.question.give_back(worker) if self.question is not None else 0
            if not starts_left:
                self.live.discard(worker)
            self.changed.notify_all()
        then = f"it starts again, {starts_left} left" if starts_left else "it is dropped (rollout.restarts)"
        log(f"{reason}\n{len(lost) + beside} prompts go to others; {then}", any_rank=True)

    def stop(self, error: Exception) -> None:
        """Lets the trainer, which waits or will, raise this."""
        with self.changed:
            self.error = self.error or error
            self.changed.notify_all()

    def count(self, rejected: int, load_s: float, loaded_bytes: int) -> None:
        """Adds to what has happened since the last step."""
        with self.changed:
            self.counts.rejected += rejected
            self.counts.load_s += load_s
            self.counts.loaded_bytes += loaded_bytes

    def ask(self, numbers: range) -> None:
        """Notes that a step asks for the next prompts."""
        with self.changed:
            assert numbers.start == self.next, f"prompts from {numbers.start} on, and {self.next} is the next"
            self.next, self.asked = numbers.stop, True
            self.changed.notify_all()

    def take(self, numbers: range) -> dict[int, Group]:
        """Returns the groups of those prompts, which were asked for, that were dealt to this board, when all are done,
        or nobody is left who samples. Raises what stopped the sampling, WorkersFail."""
        with self.changed:
            while self.live and self._lacks(numbers):
                self._await_news()
            return {number: self.done.pop(number) for number in numbers if number in self.done}

    def owed(self) -> list[int]:
        """Returns the prompts that may be begun here and will not, as nobody is left who samples; from now on they are
        another's."""
        with self.changed:
            if self.live:
                return []
            numbers, self.open = sorted(self._opened()), set()
            return numbers

    def deal(self, owners: Sequence[int], numbers: Sequence[int]) -> None:
        """Makes these the owners of what nobody was dealt yet, and shares these prompts, which are owed, among them; to
        be called where all boards have the same weights, and were asked for the same prompts."""
        with self.changed:
            self._opened()
            self.open |= set(share_of(numbers, owners, self.rank))
            self.owners = owners or self.owners
            self.changed.notify_all()

    def flush(self) -> Counts:
        """Returns what was counted since the last call."""
        with self.changed:
            counts, self.counts, now = self.counts, Counts(), time.monotonic()
            counts.rest_s += sum(now - since for since in self.resting.values())
            self.resting = dict.fromkeys(self.resting, now)
            return counts

    def close(self) -> None:
        """Lets all threads leave."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()

    def _await_news(self) -> None:
        """Waits until something changes. Raises what stopped the sampling, Closed, WorkersFail when nothing does."""
        if self.error is not None:
            raise self.error
        if self.closed:
            raise Closed
        if not self.changed.wait(self.limits.patience_s):
            raise WorkersFail(f"no rollout worker gave a sign of life in {self.limits.patience_s:g} s")

    def _lacks(self, numbers: range) -> bool:
        """Returns whether some of these are still to come."""
        return self.weights is None or not (self._opened() | self.under_way.keys()).isdisjoint(numbers)

    def _share(self, numbers: Sequence[int], at_once: int) -> list[int]:
        """Returns the first of the numbers: what one of the workers that rest is given."""
        return list(numbers[: min(at_once, math.ceil(len(numbers) / len(self.resting)))])

    def _works(self, worker: int) -> None:
        """Notes that a worker rests no more."""
        self.counts.rest_s += time.monotonic() - self.resting.pop(worker)

    def _begun(self, worker: int, mine: list[int]) -> Task:
        """Notes that a worker begins prompts of steps; returns its task."""
        self._works(worker)
        self.open -= set(mine)
        self.under_way |= dict.fromkeys(mine, worker)
        self.counts.begun += len(mine)
        assert self.weights is not None
        return Task(mine, self.weights)

    def _posed(self) -> bool:
        """Returns whether a question waits for a worker."""
        return self.question is not None and bool(self.question.open)

    def _opened(self) -> set[int]:
        """Returns the prompts that may be begun now; deals what newly may be.

        Prompt `next + k` is taken at the latest by the step that is k // prompts_per_step behind the first that has not
        asked yet. (Steps that ask for more take it earlier.)
        """
        if self.weights is not None:
            limits, asked = self.limits, int(self.asked)
            steps = min(limits.max_staleness + 1 - asked, limits.steps - self.weights.version - asked)
            end = self.next + limits.prompts_per_step * max(0, steps)
            dealt = range(self.fresh, end)
            self.open |= {n for n in dealt if self.owners[n % len(self.owners)] == self.rank}
            self.fresh = max(self.fresh, end)
        return self.open


def share_of(numbers: Sequence[int], owners: Sequence[int], rank: int) -> list[int]:
    """Returns those of the numbers that a rank gets, where each of `owners` is given one in turn.

    Example: share_of([4, 7, 9], [0, 1], 0) is [4, 9]
    """
    return [number for i, number in enumerate(numbers) if owners[i % len(owners)] == rank]
