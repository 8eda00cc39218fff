"""Defines the keys of deduplication."""

from __future__ import annotations

from pydantic import PositiveInt

from llmtrain.config.section import Section


class MinhashConfig(Section):
    """Drops near duplicates by MinHash with locality-sensitive hashing."""

    ngram_words: PositiveInt = 5  # words of a shingle
    buckets: PositiveInt = 14  # bands
    hashes: PositiveInt = 8  # hashes in a band: pairs of similarity s are found with 1 - (1 - s^hashes)^buckets


class DedupConfig(Section):
    """Drops duplicates over all inputs; of copies the one of the highest priority stays, then the first."""

    exact: bool = True  # documents of equal text
    minhash: MinhashConfig | None = MinhashConfig()  # near duplicates
