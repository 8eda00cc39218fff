"""Defines the keys of deduplication."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, PositiveInt, model_validator

from llmtrain.config.section import Count, Section

MOST_HASHES = 10_000  # of a document, over all bands


class MinhashConfig(Section):
    """Drops near duplicates by MinHash with locality-sensitive hashing (arXiv 2107.06499, appendix A; the defaults are
    datatrove's and FineWeb's)."""

    ngram_words: Count = 5  # words of a shingle; a document with fewer words is only looked at by `exact`
    buckets: Count = 14  # bands
    hashes: Count = 8  # hashes in a band: pairs of similarity s are found with 1 - (1 - s^hashes)^buckets
    seed: int = Field(1, ge=0, lt=2**32)  # of the hash functions

    @model_validator(mode="after")
    def _hashes_are_few(self) -> Self:
        if self.buckets * self.hashes > MOST_HASHES:
            raise ValueError(
                f"buckets={self.buckets}, hashes={self.hashes}: a document has buckets * hashes hashes, at most "
                f"{MOST_HASHES:,}; lower one of them"
            )
        return self


class ParagraphConfig(Section):
    """Removes paragraphs that an earlier document has too, and drops documents that this leaves too short."""

    split: Literal["line", "blank_line"] = "line"  # what ends a paragraph: web pages as extracted have no blank lines
    min_chars: PositiveInt = 100  # shorter paragraphs, as titles and names, stay; characters after normalisation
    min_words: PositiveInt = 50  # a document that lost a paragraph and has fewer words left is dropped


class DedupConfig(Section):
    """Drops duplicates over all inputs; of copies the one of the highest priority stays, then the first."""

    exact: bool = True  # documents of equal text, after Unicode's NFC and with white space folded
    minhash: MinhashConfig | None = MinhashConfig()  # near duplicates
    paragraphs: ParagraphConfig | None = None  # paragraphs that stand in several documents

    @model_validator(mode="after")
    def _looks_for_something(self) -> Self:
        if not (self.exact or self.minhash or self.paragraphs):
            raise ValueError(
                "exact=false, minhash=null, paragraphs=null: nothing is looked for; set dedup to null instead"
            )
        return self
