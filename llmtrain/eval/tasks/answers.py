"""Finds the answer in a completion: reasoning is left out, then one stated rule reads what is left. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import regex

from llmtrain.rewards.extract import BOXED, HASHES, NUMBER, ascii_minus, boxed_run, boxed_start, final_answer
from llmtrain.rewards.number import option

FENCED = re.compile(r"^[ \t]*```[\w+-]*[ \t]*\n(.*?)(?:^[ \t]*```|\Z)", re.S | re.M)
IN_PARENTHESES = re.compile(r"\(([A-Z])\)")

Thoughts = Sequence[Sequence[str]]
"""Holds what opens and what closes reasoning, as ["<think>", "</think>"]."""


def without_thoughts(completion: str, thoughts: Thoughts, prompt: str = "") -> str:
    """Returns what stands behind the reasoning of a completion.

    All up to the last closing mark is left out, and so is what stands behind an opening mark that nothing closes: it
    was cut off. A prompt that ends with an opening mark has opened it.
    Example: without_thoughts("<think>is it 3?</think> 4", [("<think>", "</think>")]) -> " 4"
    """
    for opening, closing in thoughts:
        opened = prompt.rstrip().endswith(opening)
        if closing in completion:
            completion = completion.rpartition(closing)[2]
        elif opened:
            completion = ""
        completion = completion.partition(opening)[0]
    return completion


def until_stop(completion: str, stop: Sequence[str]) -> str:
    """Returns a completion up to the first of the texts that end it. Example: until_stop("4\\nQ: 5", ["\\nQ:"]) ->
    "4"."""
    ends = [completion.index(text) for text in stop if text in completion]
    return completion[: min(ends)] if ends else completion


def last_boxed(text: str) -> str | None:
    """Returns the last run of boxed values, with their boxes. Example: "so \\\\boxed{3}." -> "\\\\boxed{3}"."""
    return boxed_run(text, boxed_start(text)) if BOXED in text else None


def last_hashes(text: str) -> str | None:
    """Returns what follows the last `####` on its line. Example: "#### 42\\nThat" -> "42"."""
    found = HASHES.findall(text)
    return found[-1].strip() if found else None


def last_letter(text: str) -> str | None:
    """Returns the letter of a choice: where the answer stands (see `answer_part` of the rewards), else the last one in
    parentheses. Example: "The answer is (B)." -> "B"."""
    found = IN_PARENTHESES.findall(text)
    return option(final_answer(text)) or (found[-1] if found else None)


def last_number(text: str) -> str | None:
    """Returns the last number, without its separators. Example: "5 + 1,234 is 1,239." -> "1239"."""
    found = [match.group().replace(",", "") for match in NUMBER.finditer(ascii_minus(text))]
    return found[-1].removeprefix("+") if found else None


def code_in(text: str) -> str:
    """Returns the content of the last block between lines of ```, else the whole text, its white space kept."""
    blocks = FENCED.findall(text)
    return blocks[-1] if blocks else text


def whole(text: str) -> str | None:
    """Returns the text without white space around it, None where there is none."""
    return text.strip() or None


EXTRACT: Mapping[str, Callable[[str], str | None]] = {
    "reward": whole,
    "whole": whole,
    "boxed": last_boxed,
    "hashes": last_hashes,
    "letter": last_letter,
    "number": last_number,
    "code": code_in,
}


def extractor(rule: str, pattern: str | None, deadline_s: float) -> Callable[[str], str | None]:
    """Returns the function of a rule (`extract` of a task). That of a `pattern` raises TimeoutError where a text takes
    it longer than `deadline_s`, as one that backtracks may, for ever."""
    if rule != "regex":
        return EXTRACT[rule]
    expression = regex.compile(pattern or "")

    def last_match(text: str) -> str | None:
        matches = list(expression.finditer(text, timeout=deadline_s))
        return (matches[-1].group(1 if expression.groups else 0) or "").strip() or None if matches else None

    return last_match


def normal(text: str) -> str:
    """Returns a text as exact matching compares it: without white space around it and repeated within it."""
    return " ".join(text.split())
