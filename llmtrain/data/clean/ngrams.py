"""Hashes word n-grams of texts, and looks them up in a sorted array: eight bytes an n-gram, and no Python object."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from xxhash import xxh3_64_intdigest

UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+")
"""A word: letters and digits. In scripts without spaces (Thai, Lao, Burmese, Khmer, Japanese, Chinese) a character."""
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
