"""Turns tokens into text as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

UNFINISHED = "\ufffd"  # decoded from bytes that are not yet a character


class TextStream:
    """Gives the text that each token adds; the pieces together are the text of all tokens.

    Tokens may be parts of a character: its bytes wait for the rest. Only what came last is decoded again, with the
    piece before it, as a decoder may treat the first token of a text in its own way.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self.decode = decode
        self.shown: list[int] = []  # tokens of the last piece
        self.new: list[int] = []  # tokens whose text is not complete

    def push(self, token: int) -> str:
        """Returns the text that a token completes; empty if none."""
        self.new.append(token)
        piece = self._piece()
        if not piece or piece.endswith(UNFINISHED):
            return ""
        self.shown, self.new = self.new, []
        return piece

    def rest(self) -> str:
        """Returns what has waited in vain."""
        return self._piece() if self.new else ""

    def _piece(self) -> str:
        return self.decode(self.shown + self.new)[len(self.decode(self.shown)) :]


def text_of(tokens: Iterable[int], decode: Callable[[Sequence[int]], str]) -> Iterator[str]:
    """Yields the text that each token adds, where it adds some (see `TextStream`)."""
    stream = TextStream(decode)
    yield from filter(None, map(stream.push, tokens))
    if rest := stream.rest():
        yield rest


def unsure(text: str, marks: Sequence[str]) -> int:
    """Returns how many characters at the end of a text may be the beginning of one of the marks.

    Example: unsure("a <to", ["<tool_call>"]) is 3
    """
    return max((n for mark in marks for n in range(1, len(mark)) if text.endswith(mark[:n])), default=0)
