"""Batches made ahead in threads: the same for any number, no hang when one fails."""

from __future__ import annotations

import threading
import time

import pytest

from llmtrain.data.ahead import Ahead


@pytest.mark.parametrize("workers", [0, 1, 2, 4])
def test_any_number_of_workers_gives_the_same_in_order(workers: int) -> None:
    def make(key: int) -> int:
        time.sleep(0.002 * (key % 3))
        return key * key

    with Ahead(make, workers) as ahead:
        for step in range(5):
            assert ahead.take([4 * step + i for i in range(4)], [4 * step + 4 + i for i in range(4)]) == [
                (4 * step + i) ** 2 for i in range(4)
            ]


def test_it_works_ahead_and_in_threads_of_its_own() -> None:
    made: list[tuple[int, str]] = []
    third = threading.Event()

    def make(key: int) -> int:
        made.append((key, threading.current_thread().name))
        if key == 3:
            third.set()
        return key

    with Ahead(make, 2) as ahead:
        assert ahead.take([1, 2], [3]) == [1, 2]
        assert third.wait(5)
        assert ahead.take([3]) == [3]
    assert sorted(key for key, _ in made) == [1, 2, 3] and all(name.startswith("loader") for _, name in made)


def test_a_wrong_guess_is_given_up_and_what_is_taken_is_not_kept() -> None:
    with Ahead(lambda key: [key], 2) as ahead:
        first = ahead.take([1], [2, 3])[0]
        assert ahead.take([7], [8]) == [[7]] and set(ahead.begun) == {8}
        assert ahead.take([1])[0] is not first


def test_a_worker_that_fails_is_an_error_with_its_cause() -> None:
    def make(key: int) -> int:
        if key == 2:
            raise OSError("stale file handle")
        return key

    began = time.monotonic()
    with Ahead(make, 2) as ahead:
        assert ahead.take([1], [2]) == [1]
        with pytest.raises(RuntimeError, match="a loader worker failed at 2: OSError: stale file handle") as error:
            ahead.take([2], [3])
        assert isinstance(error.value.__cause__, OSError)
    assert time.monotonic() - began < 5
