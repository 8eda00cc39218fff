"""What environments reward, beside the rewards of a run."""

from __future__ import annotations

import pytest

from llmtrain.config.environment import EnvironmentConfig
from llmtrain.envs.parts import add_parts, episode_scores, failures_of, judged_by_environment
from llmtrain.rewards import RewardsFail, Score, count_failures, stop_if_failing
from llmtrain.types import Group, Sample


def sample(reward: float, parts: dict[str, float], errors: dict[str, str]) -> Sample:
    return Sample([1], [2], [True], [0.0], [0], True, reward=reward, parts=parts, errors=errors)


def judged(settings: EnvironmentConfig, *said: tuple[dict[str, float], dict[str, str]]) -> tuple[Group, list]:
    """Returns samples that each got 2.0 by the reward `math`, and what the environment said, with its entries."""
    group = [sample(0.0, *each) for each in said]
    left = judged_by_environment([group])
    for each in group:
        each.reward, each.parts, each.errors = 2.0, {"math": 2.0}, {}
    return group, add_parts([group], left, settings)


def test_parts_are_added_by_their_weights() -> None:
    settings = EnvironmentConfig(game="nim", weights={"calls": -0.5})
    group, entries = judged(settings, ({"won": 1.0, "calls": 2.0}, {}), ({"won": -1.0}, {}))
    assert [s.reward for s in group] == [2 + 1 - 1, 2 - 1]
    assert group[1].parts == {"math": 2.0, "calls": 0.0, "won": -1.0} and not group[1].errors
    assert [(entry.name, entry.weight) for entry in entries] == [("calls", -0.5), ("won", 1.0)]


def test_where_the_environment_failed_each_part_counts_the_worst() -> None:
    math = type("Entry", (), {"name": "math", "weight": 1.0})()
    failed = {"environment": "OSError: x"}
    group, entries = judged(EnvironmentConfig(game="nim"), ({"won": -3.0}, {}), ({}, failed), ({"won": 1.0}, {}))
    count_failures([math, *entries], [group])
    assert [s.reward for s in group] == [-1.0, -1.0, 3.0] and group[1].parts["won"] == -3.0
    assert group[1].errors == {"won": "OSError: x", "environment": "OSError: x"}


def test_too_many_failures_end_the_run() -> None:
    settings = EnvironmentConfig(game="nim", max_error_share=0.4)
    group, entries = judged(settings, ({}, {"environment": "OSError: x"}), ({}, {}))
    told = r"environment: failed on 1 of 2 completions, more than rollout\.environment\.max_error_share=0\.4"
    with pytest.raises(RewardsFail, match=told):
        stop_if_failing([*entries, *failures_of(settings)], [s.errors for s in group])


def test_a_part_may_not_be_called_as_a_reward() -> None:
    with pytest.raises(ValueError, match="rewards a part 'math', and one of rewards has that name"):
        judged(EnvironmentConfig(game="nim"), ({"math": 1.0}, {}))


def test_without_an_environment_nothing_is_added() -> None:
    assert add_parts([[sample(1.0, {}, {})]], [({}, {})], None) == []


def test_an_evaluation_scores_by_the_parts_or_as_a_reward_judged() -> None:
    scores = episode_scores(EnvironmentConfig(game="nim", weights={"calls": -0.5}, max_error_share=0.5))
    group = [sample(0.0, {"won": 1.0, "calls": 2.0}, {}), sample(0.0, {"won": 1.0}, {"environment": "OSError: x"})]
    assert scores(group, None) == [Score(1 - 0.5 * 2), Score(0.0, "OSError: x")]
    assert scores(group, [Score(0.3), Score(0.4)]) == [Score(0.3), Score(0.0, "OSError: x")]
    with pytest.raises(RewardsFail, match="environment: failed on 2 of 2 completions"):
        scores([group[1], group[1]], None)
