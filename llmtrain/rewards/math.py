"""Rewards mathematical equality, as math-verify finds it. Runs in a worker: sympy may hang on what a model wrote."""

from __future__ import annotations

import logging
import re
from typing import Any

from llmtrain.rewards.extract import BOXED, answer_part, gold_text, plain
from llmtrain.rewards.number import SENTENCE, is_number, option

NEEDS = "`answer`: a number, or text with a number, LaTeX or a word; of GSM8K's what follows `####`"


def extract(completion: str) -> str | None:
    """Returns the value that math-verify reads, in a normal form. Example: "so it is \\boxed{\\frac{2}{4}}" ->
    "1/2"."""
    found = read(*answer_part(completion))
    return str(found[0]) if found else None


def score(completion: str, example: dict[str, Any]) -> float:
    """Returns 1.0 when the answer equals `example["answer"]`, else 0.0."""
    from math_verify import verify

    gold = plain(gold_text(example["answer"]) or "")
    part, marked = answer_part(completion)
    if re.fullmatch(r"\(?[A-Z]\)?", gold) and (letter := option(part)):
        return float(letter == gold.strip("()"))
    return float(verify(boxed(gold), read(part, marked)))


def classes(completions: list[str]) -> list[int | None]:
    """Returns for each completion the number of its answer, equal for equal answers; None where there is none.

    Example: ["\\boxed{0.5}", "\\boxed{\\frac{1}{2}}", "hm", "7"] -> [0, 0, None, 1]
    """
    from math_verify import verify

    kinds: list[list[Any]] = []
    numbers: list[int | None] = []
    for found in (read(*answer_part(completion)) for completion in completions):
        same = (n for n, kind in enumerate(kinds) if str(kind[0]) == str(found[0]) or verify(kind, found))
        number = next(same, len(kinds)) if found else None
        if number == len(kinds):
            kinds.append(found)
        numbers.append(number)
    return numbers


def read(part: str, marked: bool = False) -> list[Any]:
    """Returns what math-verify reads in the part of a completion with the answer: value and text, or nothing.

    Where a mark says that this is the answer, or no words stand there, it is a number only if all of it is accounted
    for; else it is read whole, so that `10^{-3}` is not 10.
    """
    from math_verify import parse

    text = plain(part)
    value = SENTENCE.split(text.strip(" \t*_`"))[0].removesuffix(".").strip(" *_`")
    if BOXED in text:
        return parse(text)
    if "\\" in value and not re.search(r"\$|\\[(\[]", value.replace("\\$", "")):
        return boxed(value) if "\\$" in value or is_number(value) else whole(value) or boxed(value)
    if re.fullmatch(r"[(\[{][^()]*[)\]}]|[A-Za-z]+", value) and (found := boxed(value)):
        return found
    if value.count("$") > 1 or re.search(r"\\[(\[]", value):
        return parse(text)
    right = value if re.search("[<>≤≥≠]", value) else value.rpartition("=")[2].strip()
    if right and is_number(right):
        return parse(right)
    return whole(value) if marked or not re.search("[A-Za-z]{2}", value) else parse(text)


def whole(value: str) -> list[Any]:
    """Returns what math-verify reads in a value of which it may leave nothing out. Example: "2x" -> [2*x]"""
    from math_verify import LatexExtractionConfig, parse

    config = [LatexExtractionConfig(boxed_match_priority=0)]
    return parse(f"{BOXED}{{{value}}}", extraction_config=config, fallback_mode="no_fallback")


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
