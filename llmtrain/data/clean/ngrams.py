"""Hashes word n-grams of texts, and looks them up in a sorted array: eight bytes an n-gram, and no Python object."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from xxhash import xxh3_64_intdigest

UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+")
"""A word: letters and digits. In scripts without spaces (Thai, Lao, Burmese, Khmer, Japanese, Chinese) a character."""
BATCH = 2**22  # hashes that wait until they are counted
BASE = np.uint64(0x9E3779B97F4A7C15)  # an odd number, so that no bit of an earlier word is lost


def word_hashes(words: Sequence[str]) -> np.ndarray:
    """Returns a 64-bit hash of every word, in lower case."""
    known = {word: xxh3_64_intdigest(word.lower().encode("utf-8", "surrogatepass")) for word in set(words)}
    return np.fromiter(map(known.__getitem__, words), np.uint64, len(words))


def ngram_hashes(hashes: np.ndarray, n: int) -> np.ndarray:
    """Returns a 64-bit hash of every `n` words in a row: the polynomial of their hashes, modulo 2^64."""
    count = max(0, len(hashes) - n + 1)
    found = np.zeros(count, np.uint64)
    for i in range(n):
        found = found * BASE + hashes[i : i + count]
    return found


def in_sorted(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Returns the place of every wanted value in the sorted keys, -1 where it is not among them."""
    if not len(keys):
        return np.full(len(wanted), -1)
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, places, -1)


class Gathered:
    """Counts the rows that hold each hash. Of more than `most` hashes those below a limit stay, which is halved until
    they fit: the same ones, whatever the order of the rows.

    `held`: by the number of words, the sorted hashes and the rows of each; `one_in`: of how many hashes one stays.
    """

    def __init__(self, most: int | None = None) -> None:
        self.most, self.one_in = most, 1
        self.held: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.waiting: dict[int, list[np.ndarray]] = {}
        self.num_waiting = 0

    def add(self, row: dict[int, np.ndarray]) -> None:
        """Takes the hashes of a row, each once, by the number of their words."""
        for words, hashes in row.items():
            own = hashes if self.one_in == 1 else hashes[hashes < np.uint64(2**64 // self.one_in)]
            self.waiting.setdefault(words, []).append(own)
            self.num_waiting += len(own)
        if self.num_waiting > BATCH:
            self.settle()

    def settle(self) -> None:
        """Counts what waits."""
        for words, waiting in self.waiting.items():
            before, rows = self.held.get(words, (np.empty(0, np.uint64), np.empty(0, np.int64)))
            hashes, place = np.unique(np.concatenate([before, *waiting]), return_inverse=True)
            counts = np.concatenate([rows, np.ones(len(place) - len(rows), np.int64)])
            self.held[words] = hashes, np.bincount(place, counts, len(hashes)).astype(np.int64)
        self.waiting, self.num_waiting = {}, 0
        while self.most is not None and sum(len(hashes) for hashes, _ in self.held.values()) > self.most:
            self.one_in *= 2
            limit = np.uint64(2**64 // self.one_in)
            ends = {words: np.searchsorted(hashes, limit) for words, (hashes, _) in self.held.items()}
            self.held = {words: (h[: ends[words]], rows[: ends[words]]) for words, (h, rows) in self.held.items()}
