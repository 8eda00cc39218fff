"""Defines the keys of the cleaning steps that look at what a document is about and what it holds."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from llmtrain.config.section import Section, Share, UserPath


class CodeConfig(Section):
    """Drops code that nobody wrote: generated, minified and data-like files."""

    max_line_chars: PositiveInt = 1000  # longest line


class MathConfig(Section):
    """Marks mathematical documents by a score, in the column `math`."""

    only: bool = False  # drop documents that are not mathematical
    threshold: Share = 0.5  # least score of a mathematical document


class ClassifierConfig(Section):
    """Keeps documents that a linear classifier over words and n-grams, trained here, finds like the good seeds."""

    good: UserPath  # rows of good documents
    bad: UserPath | None = None  # rows of bad documents; None = a sample of the collected ones
    threshold: Share = 0.5  # least score to stay


class ToxicityConfig(Section):
    """Drops documents by word lists, and by a model of profanity in English."""

    word_lists: UserPath | None = None  # a directory of files, named by language code, with a word or phrase a line
    max_words_share: Share = 0.0  # largest share of words that are on the list
    model: bool = False  # also judge English by alt-profanity-check (extra `toxicity`)


class ContaminationConfig(Section):
    """Drops documents that hold n-grams of evaluation problems."""

    n: PositiveInt = 13  # words of an n-gram
    sets: list[UserPath] = Field([])  # more rows of problems, beside all that this document evaluates on


class PiiConfig(Section):
    """Replaces personal data by typed placeholders, as <EMAIL>, and counts them."""

    kinds: list[Literal["email", "ip", "phone", "card", "iban", "ssn", "key"]] = Field(
        ["email", "ip", "phone", "card", "iban", "ssn", "key"]
    )
