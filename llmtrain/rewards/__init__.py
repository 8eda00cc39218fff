"""Selects a verifiable reward: a function of a completion and the line of the problem file that it answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType

from llmtrain.config.schema import RewardConfig
from llmtrain.rewards import format, math, reasoning
from llmtrain.types import Group, Reward

BY_NAME: dict[str, ModuleType] = {"reasoning_gym": reasoning, "first_integer": format, "math": math}


def reward_fn(name: str) -> Callable[[str, dict], float]:
    """Returns the function behind a name: (completion, example) -> 1.0 for a right answer, else 0.0."""
    return BY_NAME[name].reward


def build_reward(rewards: Sequence[RewardConfig], decode: Callable[[list[int]], str]) -> Reward:
    """Returns the sum of the rewards by their weights; each is kept in `parts`."""
    functions = {r.name: (reward_fn(r.name), r.weight) for r in rewards}

    def reward(groups: Sequence[Group]) -> None:
        for sample in (sample for group in groups for sample in group):
            text = decode(sample.ids)
            sample.parts = {name: function(text, sample.example) for name, (function, _) in functions.items()}
            sample.reward = sum(functions[name][1] * value for name, value in sample.parts.items())

    return reward


def extract_answer(name: str, completion: str) -> str | None:
    """Returns the answer that this reward reads in the completion, for majority votes; None when there is none."""
    return BY_NAME[name].extract(completion)
