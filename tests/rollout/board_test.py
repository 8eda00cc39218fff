"""Which prompts may be begun when, with two prompts a step, in absolute numbers."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from llmtrain.rollout.board import Board, Closed, Limits, Task, WorkersFail
from llmtrain.rollout.question import Question
from llmtrain.rollout.shared_weights import Shared, share
from llmtrain.types import Group, Prompt, Sample, Sampling


def weights(version: int) -> Shared:
    return share([("w", torch.zeros(1))], version, torch.float32)


def board(max_staleness: int = 1, steps: int = 10, at_once: int = 100, first: int = 0, workers: int = 1) -> Board:
    return Board(Limits(2, max_staleness, steps, at_once, patience_s=0.5), first, set(range(workers)))


def begun(b: Board, worker: int = 0) -> list[int]:
    task = b.begin(worker, 0.0)
    return [] if task is None else task.numbers


def taken(b: Board, numbers: range) -> list[Group]:
    b.ask(numbers)
    return list(b.take(numbers).values())


def groups(numbers: list[int]) -> dict[int, Group]:
    return {n: [Sample([n], [n], [True], [-1.0], [0], True)] for n in numbers}


def test_nothing_begins_without_weights() -> None:
    assert begun(board()) == []


def test_how_far_ahead_prompts_are_begun() -> None:
    """Weights of version 0 may be used by the steps 0 and 1 (0 to 2): prompts 0 to 3 (0 to 5). Asking changes nothing:
    only newer weights let more begin."""
    for staleness, ahead in ((1, [0, 1, 2, 3]), (2, [0, 1, 2, 3, 4, 5])):
        b = board(staleness)
        b.publish(weights(0))
        assert begun(b) == ahead
        b.finish(0, groups(ahead))
        assert [g[0].ids for g in taken(b, range(2))] == [[0], [1]]
        assert begun(b) == []
        b.publish(weights(1))
        assert begun(b) == [ahead[-1] + 1, ahead[-1] + 2]


def test_a_step_that_asks_again_takes_what_was_begun_for_the_next() -> None:
    b = board()
    b.publish(weights(0))
    b.finish(0, groups(begun(b)))
    taken(b, range(2))
    taken(b, range(2, 4))  # which would have been those of step 1
    assert begun(b) == [4, 5]  # for step 1, by weights of version 0
    b.finish(0, groups([4, 5]))
    b.publish(weights(1))
    assert begun(b) == [6, 7]


def test_nothing_is_sampled_for_steps_behind_the_last() -> None:
    b = board(max_staleness=5, steps=3)
    b.publish(weights(1))  # steps 1 and 2 are left
    assert begun(b) == [0, 1, 2, 3]
    b.finish(0, groups([0, 1, 2, 3]))
    taken(b, range(2))
    b.publish(weights(2))
    taken(b, range(2, 4))
    assert begun(b) == []


def test_the_last_step_may_ask_again() -> None:
    b = board(steps=1)
    b.publish(weights(0))
    b.finish(0, groups(begun(b)))
    taken(b, range(2))
    assert begun(b) == []
    with pytest.raises(WorkersFail):
        taken(b, range(2, 4))  # nobody answers, but now they are open
    assert begun(b) == [2, 3]


def test_a_resumed_run_begins_where_its_steps_go_on() -> None:
    b = board(first=14)
    b.publish(weights(7))
    assert begun(b) == [14, 15, 16, 17]


def test_workers_share_what_there_is() -> None:
    b = board(max_staleness=3, workers=3)
    assert (begun(b, 0), begun(b, 1), begun(b, 2)) == ([], [], [])  # all rest
    b.publish(weights(0))
    assert (begun(b, 0), begun(b, 1), begun(b, 2)) == ([0, 1, 2], [3, 4, 5], [6, 7])
    small = board(at_once=3)
    small.publish(weights(0))
    assert (begun(small), begun(small)) == ([0, 1, 2], [3])


def test_the_prompts_of_a_failed_worker_go_first() -> None:
    b = board(max_staleness=3, workers=2)
    b.begin(0, 0.0), b.begin(1, 0.0)
    b.publish(weights(0))
    assert (begun(b, 0), begun(b, 1)) == ([0, 1, 2, 3], [4, 5, 6, 7])
    b.finish(1, groups([4, 5, 6, 7]))
    b.fail(0, "it was killed", starts_left=1)
    b.publish(weights(1))
    b.next = 2  # as if step 0 had taken its prompts
    task = b.begin(1, 0.0)
    assert task == Task([0, 1, 2, 3, 8, 9], b.weights) and task.weights.version == 1  # the newest weights
    counts = b.flush()
    assert (counts.begun, counts.given_back, len(b.done)) == (14, 4, 4)


def test_without_workers_what_is_done_is_taken_and_the_rest_is_owed() -> None:
    b = board(workers=2)
    b.begin(0, 0.0), b.begin(1, 0.0)
    b.publish(weights(0))
    assert (begun(b, 0), begun(b, 1)) == ([0, 1], [2, 3])
    b.finish(0, groups([0, 1]))
    b.fail(0, "worker 0: killed", starts_left=0)
    assert b.owed() == []
    b.fail(1, "worker 1: too slow", starts_left=0)
    assert [g[0].ids for g in taken(b, range(2))] == [[0], [1]] and b.last_fault == "worker 1: too slow"
    assert b.owed() == [2, 3] and b.owed() == []
    assert taken(b, range(2, 4)) == [] and b.owed() == [4, 5]  # which that step may still begin


def test_the_trainer_does_not_wait_for_ever() -> None:
    b = board()
    began = time.monotonic()
    with pytest.raises(WorkersFail, match=r"no rollout worker gave a sign of life in 0\.5 s"):
        taken(b, range(2))
    assert time.monotonic() - began < 5


def test_closing_wakes_everyone() -> None:
    b, seen = board(), []

    def wait() -> None:
        try:
            b.begin(0, 60.0)
        except Closed:
            seen.append("closed")

    thread = threading.Thread(target=wait)
    thread.start()
    b.close()
    thread.join(10)
    assert seen == ["closed"]
    with pytest.raises(Closed):
        b.newest()


def test_rest_is_counted_once() -> None:
    b = board()
    begun(b)
    time.sleep(0.05)
    first, second = b.flush(), b.flush()
    assert 0.05 <= first.rest_s < 1 and second.rest_s < 0.05
    both = first + second
    assert both.rest_s == first.rest_s + second.rest_s and both.begun == 0


def asked(b: Board, prompts: int, at_once: int = 2) -> tuple[Question, threading.Thread, list]:
    """A question that a thread waits for, and what comes of it."""
    question, found = Question([Prompt([n]) for n in range(prompts)], Sampling(1), b.weights, at_once), []

    def wait() -> None:
        try:
            found.append(b.answers(question))
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    while b.question is None:
        time.sleep(0.001)
    return question, thread, found


def test_a_question_is_answered_by_who_has_no_prompts_of_a_step() -> None:
    """Its weights stay those of the moment in which it was asked. A worker that fails gives its places back."""
    b = board(workers=2)
    b.publish(weights(0))
    old = b.weights
    question, thread, found = asked(b, 5)
    b.publish(weights(1))
    first, second = b.begin(0, 0.0), b.begin(1, 0.0)
    assert first == Task([0, 1, 2, 3], b.weights) and second == Task([0, 1], old, question)
    assert b.begin(1, 0.0) == Task([2, 3], old, question)  # at_once
    b.fail(1, "killed", starts_left=1)
    assert (question.open, b.counts.given_back, b.counts.begun) == ([0, 1, 2, 3, 4], 0, 4)
    b.finish(0, groups([0, 1, 2, 3]))
    assert b.begin(0, 0.0) == Task([0, 1], old, question)
    b.finish(0, groups([0, 1]), question)
    assert [g[0].ids for g in taken(b, range(2))] == [[0], [1]]  # those of the step are its own
    b.publish(weights(2))
    assert b.begin(0, 0.0).numbers == [4, 5]  # a step goes first
    b.begin(1, 0.0), b.begin(1, 0.0)
    b.finish(1, groups([4]), question)  # in any order
    assert not found
    b.finish(1, groups([2, 3]), question)
    thread.join(10)
    assert {n: [s.ids for s in group] for n, group in found[0].items()} == {n: [[n]] for n in range(5)}
    assert b.question is None


def test_workers_that_rest_share_a_question() -> None:
    b = board(workers=2, steps=0)
    b.publish(weights(0))
    assert begun(b, 0) == begun(b, 1) == []
    question, thread, found = asked(b, 3, at_once=9)
    assert (begun(b, 0), begun(b, 1)) == ([0, 1], [2])
    b.finish(0, groups([0, 1]), question)
    b.finish(1, groups([2]), question)
    thread.join(10)
    assert len(found[0]) == 3


def test_who_asks_is_told_what_stops_the_sampling() -> None:
    for stop, kind in (
        (lambda b: b.fail(0, "killed", starts_left=0), dict),  # nothing is answered
        (lambda b: b.stop(FloatingPointError("diverged")), FloatingPointError),
        (lambda b: b.close(), Closed),
        (lambda b: None, WorkersFail),  # nobody gives a sign of life
    ):
        b = board()
        b.publish(weights(0))
        _, thread, found = asked(b, 1)
        stop(b)
        thread.join(10)
        assert [type(each) for each in found] == [kind] and b.question is None


def test_prompts_are_dealt_by_their_numbers() -> None:
    b = Board(Limits(2, 1, 10, 100, 0.5), 0, {0}, rank=4, owners=[2, 4, 4])
    b.publish(weights(0))
    assert begun(b) == [1, 2]
    b.finish(0, groups([1, 2]))
    assert [g[0].ids for g in taken(b, range(2))] == [[1]]


def test_other_owners_get_what_nobody_was_dealt_and_what_is_owed() -> None:
    """Prompts 0 to 3 may be begun by weights of version 0, and have been dealt, also where no worker has looked."""
    boards = [Board(Limits(2, 1, 10, 100, 0.5), 0, {0}, rank=rank, owners=[0, 1, 2]) for rank in range(3)]
    for b in boards:
        b.publish(weights(0))
    boards[2].fail(0, "killed", starts_left=0)
    owed = boards[2].owed()
    assert owed == [2]
    for b in boards:
        b.deal([0, 1], owed)
    assert [begun(b) for b in boards[:2]] == [[0, 2, 3], [1]] and boards[2].owed() == []
    for b, own in zip(boards, ([0, 2, 3], [1], []), strict=True):
        b.finish(0, groups(own))
        b.ask(range(2))
        b.publish(weights(1))
    assert [begun(b) for b in boards[:2]] == [[4], [5]] and boards[2].owed() == []
