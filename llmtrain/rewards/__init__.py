"""Rewards of completions: those of this package and users' own, each scored in worker processes with a deadline.

docs/rewards.md tells what each reads and needs. Nothing here imports torch: workers import this package.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from math import fsum
from typing import TYPE_CHECKING

from llmtrain.rewards.check import check_rows
from llmtrain.rewards.scorer import DEADLINE_S, Score, Scorer, pool_of, scorer_of

if TYPE_CHECKING:
    from llmtrain.config.schema import RewardConfig
    from llmtrain.types import Group, Reward

__all__ = [
    "RewardsFail",
    "Score",
    "Scorer",
    "build_reward",
    "check_rows",
    "count_failures",
    "extract_answer",
    "reward_fn",
    "reward_metrics",
    "scorer_of",
    "stop_if_failing",
]
OWN_ERROR_SHARE = 0.5  # the default of max_error_share for a user's own function, for a model and a judge


class RewardsFail(RuntimeError):
    """Says that a reward failed on too many completions."""


def reward_fn(name: str) -> Callable[[str, dict], float]:
    """Returns the function behind a name: (completion, example) -> its score, 0.0 where the scorer fails."""
    scorer = Scorer(name, pool_of(name, None, False), DEADLINE_S)
    return lambda completion, example: scorer.score([(completion, example)])[0].value


def extract_answer(name: str, completion: str) -> str | None:
    """Returns the answer that this reward reads in the completion; None when there is none."""
    return Scorer(name, pool_of(name, None, False), DEADLINE_S).extract(completion)


def build_reward(rewards: Sequence[RewardConfig], decode: Callable[[list[int]], str]) -> Reward:
    """Returns the sum of the rewards by their weights; each is kept in `parts`, and why it failed in `errors`. They
    read what the policy wrote last.

    Raises as `Scorer` does when its workers cannot start.
    """
    scorers = {r.name: (scorer_of(r), r.weight) for r in rewards}

    def reward(groups: Sequence[Group]) -> None:
        samples = list(chain.from_iterable(groups))
        pairs = [(decode(sample.last_turn), sample.example) for sample in samples]
        for sample in samples:
            sample.reward, sample.parts, sample.errors = 0.0, {}, {}
        for name, (scorer, weight) in scorers.items():
            for sample, score in zip(samples, scorer.score(pairs), strict=True):
                sample.parts[name] = score.value
                sample.reward += weight * score.value
                if score.error is not None:
                    sample.errors[name] = score.error

    return reward


def count_failures(rewards: Sequence[RewardConfig], groups: Sequence[Group]) -> None:
    """Makes a failed score count what moves the sum least up: 0, or the worst that this reward gave in the groups.

    Worst is lowest, and with a negative weight highest. A score of 0 would beat every negative one, and a policy would
    learn to break its scorer. `groups` are all that were sampled together, on every rank, so that all ranks agree.

    Example: scores -3 and -1 of a model that fails on a third sample -> the third counts -3
    """
    samples = list(chain.from_iterable(groups))
    for reward in rewards:
        given = [sample.parts[reward.name] for sample in samples if reward.name not in sample.errors]
        worst = min([0.0, *given], key=lambda value: reward.weight * value)
        for sample in samples:
            if reward.name in sample.errors:
                sample.parts[reward.name] = worst
    for sample in samples:
        if sample.errors:
            sample.reward = sum(reward.weight * sample.parts[reward.name] for reward in rewards)


def reward_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Returns `reward_errors`, how many scores failed, and the mean of each reward before its weight, `reward/<name>`;
    a part that an environment did not give counts 0.

    Example: two samples, on one of which `math` failed -> {"reward_errors": 1, "reward/math": 0.5}
    """
    samples = list(chain.from_iterable(groups))
    names = dict.fromkeys(chain.from_iterable(s.parts for s in samples))  # of all rounds of a step
    means = {f"reward/{name}": fsum(s.parts.get(name, 0.0) for s in samples) / len(samples) for name in names}
    return {"reward_errors": sum(len(s.errors) for s in samples), **means}


def stop_if_failing(rewards: Sequence[RewardConfig], errors: Sequence[dict[str, str]]) -> None:
    """Raises RewardsFail when a reward failed on more than its `max_error_share` of the samples, whose errors by
    reward these are."""
    for reward in rewards:
        own = OWN_ERROR_SHARE if reward.function or not reward.verifies else 1.0
        most = own if reward.max_error_share is None else reward.max_error_share
        told = [each[reward.name] for each in errors if reward.name in each]
        if told and len(told) > most * len(errors):
            key = f"{getattr(reward, 'section', 'rewards')}.max_error_share"
            raise RewardsFail(
                f"reward {reward.name}: failed on {len(told)} of {len(errors)} completions, more than {key}={most:g}; "
                f"the first time: {told[0]}; mend it (for a completion that it cannot read it should return 0.0) or "
                "raise the share"
            )
