"""Writes what a judge is asked of a completion by a rubric, and reads the score in what it answers."""

from __future__ import annotations

import math
import re
from itertools import chain
from pathlib import Path

FIELDS = ("{prompt}", "{completion}")  # of a rubric
RUBRIC = """Here is a task and an answer to it.

Task:
{prompt}

Answer:
{completion}

Judge the answer. It gets a point for each of these that holds:
- It does what the task asks, and nothing else.
- What it says is right.
- Its steps lead to its result.
- It is complete.
- It is no longer than it must be.
Say briefly why, and end with a line "Score: N", where N is the sum of the points, 0 to 5."""

NUMBER = r"(?<![^\W_])-?\d+(?:\.\d+)?"  # not within a word, as in `step1`
PARENTHESES = re.compile(r"\([^()]*\)")
SCORE = re.compile(r"(?<![^\W_])score(?![^\W_])", re.I)
TERM = rf"{NUMBER}[^\d+=.,;:]*"  # of a sum: a number, and words that say what it is for
SUM = re.compile(rf"[^\d-]*(?:{TERM}(?:\+[^\d+=.,;:]*{TERM})+=\s*)+")


def filled(rubric: str, prompt: str, completion: str) -> str:
    """Returns the rubric with its two fields filled in; what they hold is not looked at again."""
    parts = [part.replace(FIELDS[0], prompt) for part in rubric.split(FIELDS[1])]
    return completion.join(parts)


def read_rubric(key: str, path: str | None) -> str:
    """Returns the rubric that `key` names. Raises ValueError when the file lacks one of the two fields."""
    text = RUBRIC if path is None else Path(path).read_text(encoding="utf-8")
    if missing := [field for field in FIELDS if field not in text]:
        raise ValueError(f"{key}={path}: has no {missing[0]}; write it where it belongs")
    return text


def rubric_score(reply: str, lowest: float, highest: float) -> float | None:
    """Returns the score in a judgement, None where there is none from `lowest` to `highest`.

    Parentheses are left out. It is the first number behind the last word `score` that a number follows on its line; of
    a sum what stands behind its last `=`. Without such a word it is the last number.
    Example: rubric_score("Score (0-5): 1 + 1 = 2", 0, 5) -> 2.0
    """
    text = without_parentheses(reply)
    behind = chain.from_iterable(SCORE.split(line)[1:] for line in text.split("\n"))
    told = [found for part in behind if (found := re.findall(NUMBER, behind_sum(part)))]
    numbers = told[-1][:1] if told else re.findall(NUMBER, text)[-1:]
    value = float(numbers[0]) if numbers else math.nan
    return value if lowest <= value <= highest else None


def behind_sum(text: str) -> str:
    """Returns what stands behind the last `=` of the sum that a text begins with, else the text."""
    found = SUM.match(text)
    return text if found is None else text[found.end() :]


def without_parentheses(text: str) -> str:
    """Returns a text without what stands in parentheses, and in parentheses within them."""
    while (shorter := PARENTHESES.sub(" ", text)) != text:
        text = shorter
    return text
