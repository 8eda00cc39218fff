"""Defines the keys of the cleaning steps that judge web pages and prose."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from llmtrain.config.section import DeadlineS, Section, Share, UserPath


class WordsConfig(Section):
    """Says how text is split into words."""

    splitter: Literal["spacy", "regex"] = "spacy"  # spacy: as datatrove does, remembered; regex: faster, other counts


class UrlConfig(Section):
    """Drops pages by their addresses."""

    blocked_domains: UserPath | None = None  # a file with a domain a line
    blocked_words: UserPath | None = None  # a file with a word of an address a line
    bundled_lists: bool = False  # also datatrove's lists of adult sites, which take 5 to 26 s to load


class ExtractConfig(Section):
    """Extracts the main text of HTML pages with trafilatura, in a process of its own."""

    timeout_s: DeadlineS = 10.0  # for one page
    favor: Literal["balanced", "precision", "recall"] = "balanced"  # less text but surer, or more
    tables: bool = True  # keep text of tables
    comments: bool = False  # keep readers' comments


class RepairConfig(Section):
    """Mends broken encodings with ftfy and removes control characters."""

    normalization: Literal["NFC", "NFKC", "none"] = "NFC"  # of Unicode


class LanguageConfig(Section):
    """Identifies the language of the whole text, one of 176, and keeps its score."""

    keep: list[str] = Field([])  # language codes that stay; [] = all
    threshold: Share = 0.65  # least score to stay where `keep` names languages
    thresholds: dict[str, Share] = Field({})  # by language, over `threshold`


class RepetitionConfig(Section):
    """Drops documents that repeat themselves (arXiv 2112.11446, table A1)."""

    duplicate_lines: Share = 0.3  # largest share of lines that stood before


class QualityConfig(Section):
    """Drops documents by Gopher's rules of quality (arXiv 2112.11446, section A1.1)."""

    min_words: PositiveInt = 50  # fewest words
    max_words: PositiveInt = 100_000  # most words


class C4Config(Section):
    """Keeps lines and pages as C4 does (arXiv 1910.10683, section 2.2)."""

    min_sentences: int = 5  # fewest sentences left in a page


class FineWebConfig(Section):
    """Drops pages by the rules that FineWeb adds (arXiv 2406.17557, section 3.6)."""

    line_punctuation: Share = 0.12  # least share of lines that end with punctuation
    short_lines: Share = 0.67  # largest share of lines of at most `short_line_chars`
    short_line_chars: PositiveInt = 30  # what counts as short
    duplicate_chars: Share = 0.01  # largest share of characters in lines that stood before
    newline_words: PositiveFloat = 0.3  # most line breaks a word
