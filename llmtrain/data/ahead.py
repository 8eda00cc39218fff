"""Makes batches in threads before they are asked for.

What a batch holds is a function of its key alone, so neither the number of threads nor a guess that was wrong changes
it. Threads are enough: nearly all of the time goes into copies from the memory map, during which numpy lets the others
run, and a disk that is slow is waited for in the thread.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Made = TypeVar("Made")


class Ahead(AbstractContextManager, Generic[Key, Made]):
    """Calls `make` in `workers` threads for the keys that are needed next; with 0 workers when they are needed.

    Example: Ahead(load, workers=2).take([1, 2], then=[3, 4]) returns [load(1), load(2)], and goes on with 3 and 4.
    It is a context manager, which ends the threads.
    """

    def __init__(self, make: Callable[[Key], Made], workers: int) -> None:
        self.make, self.pool = make, ThreadPoolExecutor(workers, "loader") if workers else None
        self.begun: dict[Key, Future[Made]] = {}

    def take(self, keys: Sequence[Key], then: Sequence[Key] = ()) -> list[Made]:
        """Returns what `make` returns for each of the keys, and begins with those that come `then`. What was begun and
        is in neither is given up. The keys differ. Raises RuntimeError, with the cause, when a thread failed."""
        if self.pool is None:
            return [self.make(key) for key in keys]
        wanted = dict.fromkeys((*keys, *then))
        for key in [key for key in self.begun if key not in wanted]:
            self.begun.pop(key).cancel()
        for key in wanted:
            if key not in self.begun:
                self.begun[key] = self.pool.submit(self.make, key)
        return [self._result(key) for key in keys]

    def _result(self, key: Key) -> Made:
        try:
            return self.begun.pop(key).result()
        except Exception as error:
            raise RuntimeError(f"a loader worker failed at {key}: {type(error).__name__}: {error}") from error

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)
