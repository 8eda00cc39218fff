"""How many prompts a step takes until enough groups have a spread, and which groups it keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import pytest

from llmtrain.config.schema import RewardConfig, RolloutConfig
from llmtrain.data.post import ServerFault
from llmtrain.trainer import rollouts
from llmtrain.trainer.rollouts import answered_by_all, take_spread
from llmtrain.types import Group, Prompt, Sample, Sampling


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


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (FloatingPointError("not finite"), FloatingPointError, "not finite"),
        (ServerFault("it ended"), OSError, "rank 1: it ended"),
        (KeyError("x"), OSError, "rank 1: 'x'"),
        (None, None, ""),
    ],
)
def test_a_rank_that_fails_ends_all(error: Exception | None, kind: type | None, words: str) -> None:
    barrier, said = Barrier(2), {}

    def answered(rank: int) -> Any:
        def answer(prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
            if rank and error is not None:
                raise error
            return [[rank]]

        def gather(part: Any) -> list[Any]:
            said[rank] = part
            barrier.wait(10)
            return [said[0], said[1]]

        try:
            return answered_by_all(SimpleNamespace(all_gather_json=gather), answer, [], Sampling(1))
        except Exception as failed:
            return failed

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(answered, range(2))
    if error is None:
        assert (first, second) == ([[0]], [[1]])
    else:
        assert second is error and type(first) is kind and str(first) == words


def test_a_failed_score_counts_the_worst_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 scores the groups of -1 and of what fails, rank 1 that of -5: on both the failed one counts -5."""
    barrier, said = Barrier(2), {}

    def mesh(rank: int) -> Any:
        def gather(part: Any) -> list[Any]:
            said[rank] = part
            barrier.wait(10)
            return [said[0], said[1]]

        return SimpleNamespace(rank=rank, size=2, all_gather_json=gather)

    def build_reward(rewards: Any, decode: Any) -> Callable[[Sequence[Group]], None]:
        def reward(groups: Sequence[Group]) -> None:
            for (sample,) in groups:
                sample.parts = {"rm": -float(sample.ids[0])}
                sample.reward, sample.errors = 2 * sample.parts["rm"], {} if sample.ids[0] else {"rm": "too long"}

        return reward

    def rewarded(rank: int) -> list[tuple[float, dict[str, float]]]:
        groups = [[Sample([9], [i], [True], [0.0], [0], True)] for i in (1, 5, 0)]
        data, train, rollout = SimpleNamespace(curriculum=None), SimpleNamespace(steps=1), RolloutConfig()
        rewards = [RewardConfig(model="rm", weight=2.0)]
        config = SimpleNamespace(rewards=rewards, seed=1, data=data, train=train, rollout=rollout)
        job = SimpleNamespace(config=config, tokenizer=None, mesh=mesh(rank))
        rollouts.build_source(job, None, 3).reward(groups)
        return [(sample.reward, sample.parts) for (sample,) in groups]

    monkeypatch.setattr(rollouts, "build_reward", build_reward)
    for name in ("build_generator", "completion_text", "sampling_of", "stop_if_failing"):
        monkeypatch.setattr(rollouts, name, lambda *args: None)
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(rewarded, range(2)))
    assert both == [[(-2.0, {"rm": -1.0}), (-10.0, {"rm": -5.0}), (-10.0, {"rm": -5.0})]] * 2
