"""Cuts documents into passages that overlap, at paragraph borders where there are any. Pure."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

# Where a passage ends best, from the best: behind paragraphs, lines, sentences, words. A border is the end of a match.
BORDERS = tuple(map(re.compile, (r"\n[^\S\n]*\n\s*", r"\n\s*", r"(?<=[.!?…])[\"')\]»”’]*\s+|(?<=[。！？])", r"\s+")))
WRITTEN = re.compile(r"\S")


class Span(NamedTuple):
    """Holds the place of a passage in its document, in characters."""

    start: int
    end: int


class Ruler:
    """Measures a text in characters, or in tokens whose places are given, sorted."""

    def __init__(self, text: str, tokens: Sequence[tuple[int, int]] | None = None) -> None:
        self.chars = len(text)
        self.starts = None if tokens is None else [start for start, _ in tokens]
        self.ends = None if tokens is None else [end for _, end in tokens]

    def forward(self, start: int, size: int) -> int:
        """Returns the furthest place from which back to `start` there are at most `size` units."""
        if self.starts is None or self.ends is None:
            return min(start + size, self.chars)
        first = bisect_right(self.ends, start)  # a token that is cut counts on both sides
        return self.chars if first + size >= len(self.ends) else max(self.starts[first + size], start + 1)

    def back(self, end: int, size: int) -> int:
        """Returns the first place from which to `end` there are at most `size` units."""
        if self.starts is None or self.ends is None:
            return max(end - size, 0)
        last = bisect_left(self.starts, end)
        return end if size == 0 or last == 0 else self.starts[max(last - size, 0)]


def spans(text: str, size: int, overlap: int, tokens: Sequence[tuple[int, int]] | None = None) -> Iterator[Span]:
    """Yields the passages of a document: together they hold all of it but white space, each has at most `size` units,
    and repeats at most `overlap` units of the one before.

    A unit is a character, or one of `tokens`, their places in the text. `overlap` must be less than half of `size`. A
    passage ends behind the last paragraph, line, sentence or word, tried in this order, that ends in its second half;
    where none does, within a word. The next one begins at such a border within the overlap, if there is one.
    """
    ruler, start, told = Ruler(text, tokens), 0, 0
    while found := WRITTEN.search(text, start):
        start = found.start()
        limit = ruler.forward(start, size)
        half = ruler.forward(start, (size + 1) // 2)
        end = limit if limit >= len(text) else best_border(text, half, limit, last=True) or limit
        span = Span(start, start + len(text[start:end].rstrip()))
        if span.end > told:  # else only white space follows what is repeated
            yield span
        if end >= len(text):
            return
        told, earliest = span.end, max(ruler.back(end, overlap), start + 1)
        start = best_border(text, earliest, end, last=False) or earliest


def best_border(text: str, low: int, high: int, last: bool) -> int | None:
    """Returns the last or first border of the best kind within `low` <= border <= `high`, None where there is none."""
    for pattern in BORDERS:
        found = [m.end() for m in pattern.finditer(text, max(low - 3, 0), high) if low <= m.end() <= high]
        if found:
            return found[-1] if last else found[0]
    return None
