"""How many prompts a step takes until enough groups have a spread, and which groups it keeps."""

from __future__ import annotations

from types import SimpleNamespace

from llmtrain.trainer.rollouts import take_spread


class Source:
    """Answers prompt n with the group [n]."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def ask(self, numbers: range) -> list[list[int]]:
        self.asked.append(list(numbers))
        return [[n] for n in numbers]


def taken(
    spread: set[int], rounds: int, number: int = 0, state: dict | None = None
) -> tuple[list[int], list[list[int]], dict]:
    """Returns the groups of a step that wants three, what was asked for in each round, and the state behind it."""
    source, job = Source(), SimpleNamespace(state={} if state is None else state)
    groups, sampled = take_spread(job, source.ask, number, 3, rounds, lambda group: group[0] in spread)
    assert [n for (n,) in sampled] == [n for asked in source.asked for n in asked]
    return [n for (n,) in groups], source.asked, job.state


def test_one_round_takes_what_comes_in_its_order() -> None:
    assert taken({1}, rounds=1) == ([0, 1, 2], [[0, 1, 2]], {"prompts": 3})


def test_exactly_enough_end_the_sampling() -> None:
    assert taken({0, 1, 2, 3}, rounds=5) == ([0, 1, 2], [[0, 1, 2]], {"prompts": 3})
    assert taken({1, 4, 5}, rounds=5) == ([1, 4, 5], [[0, 1, 2], [3, 4, 5]], {"prompts": 6})


def test_surplus_is_dropped() -> None:
    assert taken({0, 1, 4, 5}, rounds=5)[0] == [0, 1, 4]


def test_groups_without_a_spread_fill_up_in_their_order() -> None:
    assert taken({4}, rounds=2) == ([0, 1, 4], [[0, 1, 2], [3, 4, 5]], {"prompts": 6})
    assert taken(set(), rounds=2)[0] == [0, 1, 2]


def test_the_next_step_takes_the_prompts_behind() -> None:
    assert taken({9, 10, 11}, 5, number=1, state={"prompts": 9}) == ([9, 10, 11], [[9, 10, 11]], {"prompts": 12})
    # a checkpoint that was made before prompts were counted
    assert taken({6, 7, 8}, 5, number=2) == ([6, 7, 8], [[6, 7, 8]], {"prompts": 9})
