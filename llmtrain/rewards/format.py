"""Rewards a completion whose first number is the answer, an integer."""

from __future__ import annotations

from typing import Any

from llmtrain.rewards.extract import NUMBER, ascii_minus, first_integer, gold_text

NEEDS = "`answer`: an integer, as a number or text"


def extract(completion: str) -> str | None:
    """Returns the first number of a completion if it is an integer, else None. Example: "42. That is" -> "42"."""
    return first_integer(completion)


def score(completion: str, example: dict[str, Any]) -> float:
    """Returns 1.0 when the first number of the completion is the integer `example["answer"]`, else 0.0."""
    gold = first_integer(gold_text(example["answer"]) or "")
    return float(gold is not None and first_integer(completion) == gold)


def fault(example: dict[str, Any]) -> str | None:
    """Returns why a row cannot be rewarded, None if it can."""
    if "answer" not in example:
        return "field 'answer' is missing; add the right integer"
    gold = gold_text(example["answer"])
    if gold is None or not NUMBER.fullmatch(ascii_minus(gold)) or first_integer(gold) is None:
        return f"field 'answer' is {example['answer']!r:.60}: this reward reads integers alone; use math, or mend it"
    return None
