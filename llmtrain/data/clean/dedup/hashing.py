"""Computes what copies have in common: a hash of the text, and MinHash signatures of its shingles, cut into bands."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

import numpy as np
import regex
import xxhash
from datatrove.utils.text import PUNCTUATION, TextNormConfig, simplify_text

from llmtrain.config.clean.dedup import MinhashConfig

# White space and diacritics are left to `words`, which does them faster; so are punctuation marks where a text is not
# ASCII, as Python's `translate` is slow there.
ASCII = TextNormConfig(norm_whitespace=False, norm_unicode_diacritics=False)
OTHER = TextNormConfig(norm_whitespace=False, norm_unicode_diacritics=False, remove_punctuation=False)
PUNCTUATION_MARKS = re.compile(f"[{re.escape(PUNCTUATION)}]+")
DIACRITICS = regex.compile(r"\p{Mn}+")
# Characters of scripts without spaces: Thai, Lao, Myanmar, Khmer, Japanese, Chinese.
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd; combines the hashes of a shingle's words
CHUNK = 4096  # shingles that are hashed at a time


def normalized(text: str) -> str:
    """Returns text in Unicode's form NFC with every run of white space as one space."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def digest(text: str) -> bytes:
    """Returns the xxHash of 128 bits of a text: among a billion texts two share one with probability 1.5e-21."""
    return xxhash.xxh3_128_digest(text.encode("utf-8", "surrogatepass"))


def words(text: str) -> list[str]:
    """Returns the words that shingles are made of: of the text as datatrove simplifies it (lower case, numbers as 0, no
    punctuation or diacritics), split at white space, and at each character of scripts without spaces."""
    if text.isascii():
        return simplify_text(text, ASCII).split()
    text = PUNCTUATION_MARKS.sub(" ", simplify_text(text, OTHER))
    text = DIACRITICS.sub("", unicodedata.normalize("NFD", text))
    return UNSPACED.sub(r" \g<0> ", text).split()


def shingles(split: list[str], ngram_words: int) -> np.ndarray:
    """Returns the 64-bit hashes of all n-grams of words; none where there are fewer words."""
    try:
        hashes = np.fromiter(map(xxhash.xxh3_64_intdigest, split), np.uint64, len(split))
    except UnicodeEncodeError:  # half a surrogate pair
        return shingles([word.encode("utf-8", "replace").decode() for word in split], ngram_words)
    count = max(len(split) - ngram_words + 1, 0)
    mixed = np.zeros(count, np.uint64)
    for offset in range(ngram_words):
        mixed = mixed * FACTOR + hashes[offset : offset + count]
    return mixed


class Bands:
    """Computes the keys of a document's bands. Two documents of Jaccard similarity s share a given one with
    probability s^hashes."""

    def __init__(self, settings: MinhashConfig) -> None:
        self.settings = settings
        draw = np.random.Generator(np.random.Philox(settings.seed))
        shape = (settings.buckets * settings.hashes, 1)
        self.factors = draw.integers(0, 2**31, shape, np.uint32) * np.uint32(2) + np.uint32(1)
        self.summands = draw.integers(0, 2**32, shape, np.uint32)

    def signature(self, hashed: np.ndarray) -> np.ndarray:
        """Returns the least value of each hash function a * x + b mod 2^32 over the shingles' high halves."""
        high = (hashed >> np.uint64(32)).astype(np.uint32)
        least = np.full(len(self.factors), 2**32 - 1, np.uint32)
        for start in range(0, len(high), CHUNK):
            values = self.factors * high[start : start + CHUNK]
            values += self.summands
            np.minimum(least, values.min(axis=1), out=least)
        return least

    def keys(self, text: str) -> Iterator[bytes]:
        """Yields a key for each band, of 16 bytes; none for a text with fewer words than a shingle has."""
        hashed = shingles(words(text), self.settings.ngram_words)
        if len(hashed):
            for band in self.signature(hashed).reshape(self.settings.buckets, -1):
                yield xxhash.xxh3_128_digest(band.astype("<u4").tobytes())
