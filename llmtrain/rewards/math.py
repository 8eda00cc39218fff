"""Rewards mathematical equality, as math-verify finds it. Runs in a worker: sympy may hang on what a model wrote."""

from __future__ import annotations

import logging
import re
from typing import Any

from llmtrain.rewards.extract import BOXED, final_answer, gold_text, plain

NEEDS = "`answer`: a number, or text with a number, LaTeX or a word; of GSM8K's what follows `####`"


def extract(completion: str) -> str | None:
    """Returns the value that math-verify reads, in a normal form. Example: "so it is \\boxed{\\frac{2}{4}}" ->
    "1/2"."""
    found = read(final_answer(completion))
    return str(found[0]) if found else None


def score(completion: str, example: dict[str, Any]) -> float:
    """Returns 1.0 when the answer equals `example["answer"]`, else 0.0."""
    from math_verify import verify

    gold = plain(gold_text(example["answer"]) or "")
    return float(verify(boxed(gold), read(final_answer(completion))))


def classes(completions: list[str]) -> list[int | None]:
    """Returns for each completion the number of its answer, equal for equal answers; None where there is none.

    Example: ["\\boxed{0.5}", "\\boxed{\\frac{1}{2}}", "hm", "7"] -> [0, 0, None, 1]
    """
    from math_verify import verify

    kinds: list[list[Any]] = []
    numbers: list[int | None] = []
    for found in (read(final_answer(completion)) for completion in completions):
        same = (n for n, kind in enumerate(kinds) if str(kind[0]) == str(found[0]) or verify(kind, found))
        number = next(same, len(kinds)) if found else None
        if number == len(kinds):
            kinds.append(found)
        numbers.append(number)
    return numbers


def read(part: str) -> list[Any]:
    """Returns what math-verify reads in the part of a completion with the answer: value and text, or nothing."""
    from math_verify import parse

    text = plain(part)
    value = text.strip(" \t*_`").removesuffix(".").strip(" *_`")
    formula = "\\" in value and not re.search(r"\$|\\[(\[]", value.replace("\\$", ""))
    whole = formula or re.fullmatch(r"[(\[{].*[)\]}]|[A-Za-z]+", value)
    if whole and BOXED not in text and (found := boxed(value)):
        return found
    return parse(text)


def boxed(value: str) -> list[Any]:
    """Returns what math-verify reads in a value that stands alone."""
    from math_verify import parse

    return parse(f"{BOXED}{{{value}}}")


def warm_up() -> None:
    """Imports and compiles what every call needs, in the worker from which calls are forked."""
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it reports every time limit
    for text in ("\\boxed{\\frac{1}{2}}", "$x^2 - 1$", "so 1,234 apples", "1/3"):
        score(text, {"answer": "\\sqrt{2}"})


def fault(example: dict[str, Any]) -> str | None:
    """Returns why a row cannot be rewarded, None if it can."""
    if "answer" not in example:
        return "field 'answer' is missing; add the right answer"
    if gold_text(example["answer"]) is None:
        return f"field 'answer' is {example['answer']!r:.60}: must be a number or text that is not empty; mend it"
    return None
