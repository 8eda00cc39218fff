"""Rewards with reasoning-gym's own scorers. Runs in a worker: some of them evaluate what a model wrote."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from llmtrain.rewards.extract import boxed_end, boxed_start

NEEDS = "`source`: the generator's name; `entry`: its item, with question, answer and metadata"
MARK = re.compile(r"\banswer[*_]*(?:[ \t]*[:=]|[ \t]+is\b:?|(?=\s))[*_]*[ \t]*", re.I)
# Generators whose scorers pass the answer to eval or to sympy's parser, which calls eval (version 0.1.25)
LITERALS = {"string_insertion", "spiral_matrix", "number_sorting", "binary_matrix", "n_queens"}
EXPRESSIONS = {"simple_integration", "intermediate_integration", "polynomial_multiplication", "puzzle24", "countdown"}
FUNCTIONS = {
    *("sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan", "sinh", "cosh", "tanh"),
    *("exp", "log", "ln", "sqrt", "pi", "Abs"),
}


def extract(completion: str) -> str | None:
    """Returns the answer: what stands in <answer> tags, else behind the last word `answer` (up to an empty line), else
    behind the last `####` or in the last box; None without one.

    Example: "4+7=11; answer 131" -> "131"
    """
    if tagged := re.findall(r"<answer>(.*?)</answer>", completion, re.S):
        return tagged[-1].strip() or None
    if marks := list(MARK.finditer(completion)):
        return completion[marks[-1].end() :].strip().partition("\n\n")[0].strip() or None
    if "\\boxed{" in completion:
        start = boxed_start(completion)
        return completion[start + len("\\boxed{") : boxed_end(completion, start) - 1].strip() or None
    _, found, tail = completion.rpartition("####")
    return tail.strip().partition("\n")[0] or None if found else None


def score(completion: str, example: dict[str, Any]) -> float:
    """Returns 1.0 when the scorer of `example["source"]` gives the answer full marks, else 0.0; partial marks do not
    count.

    `example["entry"]` is the item of the data set (question, answer, metadata).
    """
    answer = extract(completion)
    if answer is None or (answer != example["entry"]["answer"] and not harmless(answer, example["source"])):
        return 0.0
    return float(scorer(example["source"])(answer=answer, entry=example["entry"]) == 1.0)


def harmless(answer: str, source: str) -> bool:
    """Says whether an answer that the scorer would evaluate is an expression without other names than mathematics has.

    The sandbox holds what is evaluated; this keeps it from choosing its own reward.
    """
    if source not in LITERALS | EXPRESSIONS:
        return True
    bare = re.sub(r"(?<![\w'\"])('[^'\\\n]*'|\"[^\"\\\n]*\")", "", answer) if source in LITERALS else answer
    names = re.findall(r"(?<!\w)[^\W\d]\w*", bare)
    allowed = FUNCTIONS if source in EXPRESSIONS else set()
    return not re.search(r"['\"`\\:;@]|__|\.\s*[^\W\d]", bare) and all(len(n) == 1 or n in allowed for n in names)


@cache
def scorer(source: str) -> Callable[..., float]:
    """Returns the scorer of a generator. Raises ValueError if there is no generator of this name."""
    import reasoning_gym

    return reasoning_gym.get_score_answer_fn(source)


def warm_up(sources: Sequence[str] = ()) -> None:
    """Makes the scorers, in the worker from which calls are forked: some read files."""
    import reasoning_gym  # noqa: F401
    import sympy  # noqa: F401  used by scorers

    without_scorer(list(sources))


def without_scorer(sources: list[str]) -> list[str]:
    """Returns which of the sources are no generators that can score."""
    found = []
    for source in sources:
        try:
            scorer(source)
        except (ValueError, AssertionError):  # no such generator; `composite`, which needs others
            found.append(source)
    return found


def fault(example: dict[str, Any]) -> str | None:
    """Returns why a row cannot be rewarded, None if it can; whether the generator exists is not looked at."""
    if missing := [name for name in ("source", "entry") if name not in example]:
        named = " and ".join(map(repr, missing))
        return f"needs {named}; add what reasoning-gym generated, or choose another reward (math, first_integer)"
    if not isinstance(example["source"], str):
        return f"field 'source' is {example['source']!r:.60}: must be the name of a generator"
    entry = example["entry"]
    if not isinstance(entry, dict) or not {"question", "answer", "metadata"} <= entry.keys():
        return "field 'entry' must be an item of the generator, with question, answer and metadata"
    return None
