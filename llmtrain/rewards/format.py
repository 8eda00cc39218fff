"""Answers that are the first integer of a completion."""

from __future__ import annotations

import re


def extract(completion: str) -> str | None:
    """Example: "42. That is" -> "42"."""
    found = re.search(r"-?\d+", completion)
    return found.group() if found else None


def reward(completion: str, example: dict) -> float:
    """1.0 when the first integer equals `example["answer"]`."""
    return float(extract(completion) == str(example["answer"]))
