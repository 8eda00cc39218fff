"""Ranks that share an evaluation, as threads: who answers what, and how all of them end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from llmtrain.eval import ranks
from llmtrain.eval.ranks import Leading, agreed, lead, sharing
from llmtrain.types import Group, Prompt, Sample, Sampling
from tests.checkpoint.conftest import ThreadGroup, run_ranks

SIZE = 3


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "LEAVE_S", 0.0)


class Echo:
    """Answers each prompt with its own ids; every call is a collective, as that of a colocated generator."""

    def __init__(self, rank: ThreadGroup) -> None:
        self.rank, self.calls = rank, list[tuple[list[Prompt], Sampling]]()

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        self.calls.append((list(prompts), sampling))
        self.rank.all_gather_json(None)
        return [[Sample(p.ids, p.ids, [True], [0.0], [0], finished=True)] for p in prompts]


def test_rank_0_works_and_all_answer_each_of_its_calls() -> None:
    echoes: dict[int, Echo] = {}
    sampling, prompts = Sampling(4, 2, stop_ids=(7,), stop_strings=("x",)), [Prompt([1], 5), Prompt([2], 6)]

    def work(generator: Leading) -> list[int]:
        greedy = generator.generate(prompts[:1], Sampling(4, temperature=0.0))
        sampled = generator.generate(prompts, sampling)
        return [s.ids[0] for group in greedy + sampled for s in group]

    def action(rank: ThreadGroup) -> Any:
        echoes[rank.rank] = Echo(rank)
        return lead(rank, echoes[rank.rank], work)

    assert run_ranks(SIZE, action) == [[1, 1, 2], None, None]
    expected = [(prompts[:1], Sampling(4, temperature=0.0)), (prompts, sampling)]
    assert [echoes[rank].calls for rank in range(SIZE)] == [expected] * SIZE


@pytest.mark.parametrize(("error", "code"), [(ValueError("line 3"), 2), (RuntimeError("reward"), 1), (OSError(5), 1)])
def test_an_error_of_the_work_is_told_once_and_ends_all(error: Exception, code: int) -> None:
    def work(generator: Leading) -> None:
        generator.generate([Prompt([1])], Sampling(4))
        raise error

    first, *others = run_ranks(SIZE, lambda rank: lead(rank, Echo(rank), work))
    assert first is error
    assert [(type(other), other.code) for other in others] == [(SystemExit, code)] * 2


def fails_on(broken: dict[int, Exception]) -> Callable[[ThreadGroup], Any]:
    def action(rank: ThreadGroup) -> Any:
        def own() -> int:
            if rank.rank in broken:
                raise broken[rank.rank]
            return rank.rank

        return agreed(rank, own)

    return action


def test_each_rank_gets_its_own_result() -> None:
    assert run_ranks(SIZE, fails_on({})) == [0, 1, 2]


def test_one_line_names_the_ranks_that_failed() -> None:
    first, *others = run_ranks(SIZE, fails_on({1: FloatingPointError("not finite"), 2: ValueError("late")}))
    assert type(first) is RuntimeError and str(first) == "rank 1: not finite; rank 2: late"
    assert [other.code for other in others] == [1, 1]


def test_what_all_ranks_find_is_said_once() -> None:
    first, *others = run_ranks(SIZE, fails_on({rank: ValueError("no weights here") for rank in range(SIZE)}))
    assert type(first) is ValueError and str(first) == "no weights here"
    assert [other.code for other in others] == [2, 2]


def test_a_fault_of_the_program_keeps_its_place() -> None:
    fault = KeyError("x")
    first, second, third = run_ranks(SIZE, fails_on({1: fault}))
    assert str(first) == "rank 1: 'x'" and second is fault and third.code == 1


def test_a_rank_whose_generator_fails_ends_the_evaluation_on_all() -> None:
    """Rank 2 fails within `generate`: rank 0 names it, and does not wait for ranks that are gone."""

    class Local:
        def __init__(self, rank: ThreadGroup) -> None:
            self.rank = rank

        def wake(self) -> None:
            pass

        def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
            if self.rank.rank == 2:
                raise FloatingPointError("the logits are not finite")
            return []

    def action(rank: ThreadGroup) -> Any:
        return lead(rank, sharing(Local(rank), rank), lambda g: g.generate([Prompt([1])], Sampling(4)))

    first, *others = run_ranks(SIZE, action)
    assert type(first) is RuntimeError and str(first) == "rank 2: the logits are not finite"
    assert [(type(other), other.code) for other in others] == [(SystemExit, 1)] * 2
