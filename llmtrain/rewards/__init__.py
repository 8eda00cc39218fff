"""Selects a verifiable reward: a function of a completion and the line of the problem file that it answers."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

from llmtrain.rewards import format, math, reasoning

BY_NAME: dict[str, ModuleType] = {"reasoning_gym": reasoning, "first_integer": format, "math": math}


def reward_fn(name: str) -> Callable[[str, dict], float]:
    """Returns the function of a `grpo.reward`: (completion, example) -> 1.0 for a right answer, else 0.0."""
    return BY_NAME[name].reward


def extract_answer(name: str, completion: str) -> str | None:
    """Returns the answer that this reward reads in the completion, for majority votes; None when there is none."""
    return BY_NAME[name].extract(completion)
