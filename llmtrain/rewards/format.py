"""Rewards a completion whose first integer is the answer."""

from __future__ import annotations

import re


def extract(completion: str) -> str | None:
    """Returns the first integer of a completion, None without one. Example: "42. That is" -> "42"."""
    found = re.search(r"-?\d+", completion)
    return found.group() if found else None


def reward(completion: str, example: dict) -> float:
    """Returns 1.0 when the first integer equals `example["answer"]`, else 0.0."""
    return float(extract(completion) == str(example["answer"]))
