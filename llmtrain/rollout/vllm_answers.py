"""Reads what a vLLM server answers on /inference/v1/generate, and believes none of it unseen."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

ABOVE_ZERO, NOT_FINITE = 1e-3, -9999.0  # a log-prob may be, by rounding; what vLLM writes for NaN and minus infinity
Likeliest = list[tuple[int, float]]
"""Holds tokens with their log-probs, the likeliest first."""


class BadAnswer(Exception):
    """Says what is wrong with an answer of the server."""


@dataclass
class Said:
    """Holds the tokens of a completion, their log-probs, and what the server says that ended it."""

    ids: list[int]
    logprobs: list[float]
    ended: str | None


def in_order(answer: Any, count: int) -> list[dict[str, Any]]:
    """Returns the choices of an answer by their numbers. Raises BadAnswer unless there is one of each."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or not all(isinstance(each, dict) for each in choices):
        raise BadAnswer("without choices")
    found = {each.get("index"): each for each in choices}
    if len(choices) != count or found.keys() != set(range(count)):
        raise BadAnswer(f"with the choices {list(found)}, not those of {count} samples")
    return [found[i] for i in range(count)]


def choices_of(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """Yields the choices of a streamed answer. Raises BadAnswer where it breaks off."""
    for line in lines:
        kind, _, data = line.strip().partition(b": ")
        if not kind:
            continue
        if kind != b"data":
            raise BadAnswer(f"with {line[:80]!r} in a stream")
        if data == b"[DONE]":
            return
        try:
            yield in_order(json.loads(data), 1)[0]
        except ValueError as error:
            raise BadAnswer(f"with what is no JSON: {data[:80]!r}") from error
    raise BadAnswer("with a stream that breaks off")


def read_choice(choice: dict[str, Any], vocab_size: int) -> Said:
    """Returns what a choice holds. Raises BadAnswer unless there is a log-prob of each token, FloatingPointError for
    what vLLM writes where the logits are not finite."""
    ids, logprobs = choice.get("token_ids"), choice.get("logprobs")
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < vocab_size for i in ids):
        raise BadAnswer(f"without token ids of the vocabulary: {str(ids)[:80]}")
    if not isinstance(content, list) or [each.get("token_id") for each in content] != ids:
        raise BadAnswer("without the log-probs of its tokens")
    values = [each.get("logprob") for each in content]
    if any(value == NOT_FINITE for value in values):
        raise FloatingPointError("the logits are not finite; the weights have diverged")
    if not all(map(_is_logprob, values)):
        raise BadAnswer(f"with log-probs that are none: {str(values)[:80]}")
    return Said(ids, values, choice.get("finish_reason"))


def likeliest_of(choice: dict[str, Any], count: int, top: int | None) -> list[Likeliest]:
    """Returns the `top` likeliest tokens at each place of a choice that `read_choice` took, of `count` tokens; nothing
    where nobody asked. Raises BadAnswer unless there are so many."""
    if not top:
        return [[] for _ in range(count)]
    rows = [each.get("top_logprobs") for each in choice["logprobs"]["content"]]
    if not all(isinstance(row, list) and all(isinstance(each, dict) for each in row) for row in rows):
        raise BadAnswer("without the likeliest tokens")
    return [_likeliest([(each.get("token_id"), each.get("logprob")) for each in row], top) for row in rows]


def read_prompt(answer: Any, ids: Sequence[int], top: int) -> list[tuple[int, float, Likeliest]]:
    """Returns each token of a prompt but the first with its log-prob, and the `top` likeliest at its place. Raises
    BadAnswer unless all are there, FloatingPointError as `read_choice` does."""
    rows = answer.get("prompt_logprobs") if isinstance(answer, dict) else None
    if not isinstance(rows, list) or len(rows) != len(ids) or not all(isinstance(row, dict) for row in rows[1:]):
        raise BadAnswer("without the log-probs of a prompt's tokens")
    told = []
    for id_, row in zip(ids[1:], rows[1:], strict=True):
        named = {int(k): each.get("logprob") for k, each in row.items() if k.isdecimal() and isinstance(each, dict)}
        value = named.get(id_)
        if value == NOT_FINITE:
            raise FloatingPointError("the logits are not finite; the weights have diverged")
        if not _is_logprob(value):
            raise BadAnswer(f"with {str(value)[:80]} as the log-prob of a prompt's token")
        told.append((id_, value, _likeliest(list(named.items()), top) if top else []))
    return told


def _likeliest(found: Sequence[tuple[Any, Any]], top: int) -> Likeliest:
    """Returns the first `top` by log-prob. Raises BadAnswer for what is none, and where there are less."""
    if not all(type(id_) is int and (_is_logprob(value) or value == NOT_FINITE) for id_, value in found):
        raise BadAnswer(f"with log-probs that are none: {str(found)[:80]}")
    if len(found) < top:
        raise BadAnswer(f"with the {len(found)} likeliest tokens, not {top}")
    return sorted(found, key=lambda each: -each[1])[:top]


def _is_logprob(value: Any) -> bool:
    return type(value) is float and NOT_FINITE < value <= ABOVE_ZERO
