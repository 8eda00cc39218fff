"""Looks at the answer of a demonstration as a whole: its tokens, and what it thinks before it answers."""

from __future__ import annotations

from llmtrain.data.chat import CLOSE, OPEN
from llmtrain.data.encode import Encoded


def answer_span(row: Encoded) -> tuple[int, int]:
    """Returns the first token of the answer and the one behind it, (0, 0) where nothing is trained: what is trained, of
    several turns the last, with the token that ends it.

    Example: trained = [F, T, T, F, F, T, T] -> (5, 7)
    """
    stop = len(row.trained)
    while stop and not row.trained[stop - 1]:
        stop -= 1
    first = stop
    while first and row.trained[first - 1]:
        first -= 1
    return first, stop


def thinks_and_answers(text: str) -> bool:
    """Says whether an answer thinks, comes to an end of it, and then says something.

    The tag that opens the thinking may be part of the prompt. Examples: "<think>1+1</think> 2", "1+1</think> 2" ->
    True; " 2", "<think></think> 2", "<think>1+1", "<think>1+1</think>", "<think>1</think> so <think>2" -> False
    """
    thought, closed, said = text.rpartition(CLOSE)
    return bool(closed and thought.strip().removeprefix(OPEN).strip() and said.strip()) and OPEN not in said
