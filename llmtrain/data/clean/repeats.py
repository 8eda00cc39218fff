"""Measures repeated n-grams of words as Gopher does (arXiv 2112.11446, table A1), with numpy: the numbers are those of
datatrove's functions, which join and hash every n-gram in Python."""

from __future__ import annotations

import sys

import numpy as np

FACTOR = 0x9E3779B97F4A7C15  # odd, so that it can be inverted modulo 2**64
INVERSE = pow(FACTOR, -1, 2**64)


class Grams:
    """Holds the words of a text, for measures over several n."""

    def __init__(self, words: list[str]) -> None:
        self.words = words
        self.ends = np.concatenate([[0], np.cumsum(np.fromiter(map(len, words), np.int64, len(words)))])
        numbers = {word: number for number, word in enumerate(dict.fromkeys(words))}
        self.codes = {1: np.fromiter(map(numbers.__getitem__, words), np.int64, len(words))}
        self.joined = ""
        # Two n-grams of different words may read alike where a word has a space, which spaCy's rules allow.
        self.spaced = any(" " in word for word in numbers)

    def top_chars(self, n: int) -> int:
        """Returns the characters of all occurrences of the most frequent n-gram, the first of those that are equally
        frequent; 0 if there is none. Spaces between words count."""
        if len(self.words) < n:
            return 0
        if self.spaced:
            from datatrove.pipeline.filters.gopher_repetition_filter import find_top_duplicate, get_n_grams

            return find_top_duplicate(get_n_grams(self.words, n))
        _, first, counts = np.unique(self.coded(n), return_index=True, return_counts=True)
        most = counts.max()
        at = first[counts == most].min()
        return int((self.ends[at + n] - self.ends[at] + n - 1) * most)

    def coded(self, n: int) -> np.ndarray:
        """Returns a number for every n-gram, the same for the same words only."""
        if n not in self.codes:
            shorter, last = self.coded(n - 1)[:-1], self.codes[1][n - 1 :]
            _, numbers = np.unique(shorter * len(self.words) + last, return_inverse=True)
            self.codes[n] = numbers
        return self.codes[n]

    def duplicate_chars(self, n: int) -> int:
        """Returns the characters of n-grams that stood before, read from left to right without overlap. n-grams are the
        same if they read the same without spaces."""
        if len(self.words) < n:
            return 0
        hashes = self.hashes(n)
        ordered = np.sort(hashes)
        same = ordered[1:] == ordered[:-1]
        if not same.any():
            return 0
        chosen = np.flatnonzero(np.isin(hashes, ordered[1:][same]))
        return self.walked(chosen.tolist(), n)

    def walked(self, places: list[int], n: int) -> int:
        """Returns the characters of repeated n-grams among those beginning at these words: all that may be repeated."""
        seen, chars, free = set(), 0, 0
        for at in places:
            if at < free:
                continue
            gram = self.joined[self.ends[at] : self.ends[at + n]]
            if gram in seen:
                chars, free = chars + len(gram), at + n
            else:
                seen.add(gram)
        return chars

    def hashes(self, n: int) -> np.ndarray:
        """Returns a hash of every n-gram's characters, by differences of prefix sums modulo 2**64: equal where the
        characters are."""
        if not self.joined:
            self.joined = "".join(self.words)
            chars = np.frombuffer(self.joined.encode(f"utf-32-{sys.byteorder[0]}e", "surrogatepass"), np.uint32)
            sums = np.zeros(len(chars) + 1, np.uint64)
            np.cumsum(chars * powers(FACTOR, len(chars)), out=sums[1:])
            self.sums, self.shifts = sums[self.ends], powers(INVERSE, len(chars) + 1)[self.ends]
        return (self.sums[n:] - self.sums[:-n]) * self.shifts[:-n]


TABLE_CHARS = 1 << 20  # powers that are kept; a longer text has its own

TABLES: dict[int, np.ndarray] = {}


def powers(factor: int, count: int) -> np.ndarray:
    """Returns the first powers of a factor modulo 2**64."""
    if count > TABLE_CHARS:
        return fresh_powers(factor, count)
    if factor not in TABLES:
        TABLES[factor] = fresh_powers(factor, TABLE_CHARS)
    return TABLES[factor][:count]


def fresh_powers(factor: int, count: int) -> np.ndarray:
    table = np.full(count, factor, np.uint64)
    table[0] = 1
    return np.cumprod(table, dtype=np.uint64)
