"""Turns tokens into text as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

UNFINISHED = "\ufffd"  # decoded from bytes that are not yet a character


def text_of(tokens: Iterable[int], decode: Callable[[Sequence[int]], str]) -> Iterator[str]:
    """Yields the text that each token adds, where it adds some; the pieces together are the text of all tokens.

    Tokens may be parts of a character: its bytes wait for the rest.
    """
    ids: list[int] = []
    shown = 0
    for token in tokens:
        ids.append(token)
        text = decode(ids)
        if len(text) > shown and not text.endswith(UNFINISHED):
            yield text[shown:]
            shown = len(text)
    if rest := decode(ids)[shown:]:
        yield rest
