"""Drops pages by the rules that FineWeb adds to Gopher's and C4's (arXiv 2406.17557, section 3.6)."""

from __future__ import annotations

import math

from llmtrain.config.clean.web import FineWebConfig, WordsConfig
from llmtrain.data.clean.step import Check
from llmtrain.data.clean.thresholds import checked


def make(settings: FineWebConfig, words: WordsConfig) -> Check:
    """Returns a check with the decisions and reasons of datatrove's filter: `line_punct_ratio`, `short_line_ratio`,
    `char_dup_ratio`, `list_ratio`."""
    from datatrove.pipeline.filters.fineweb_quality_filter import FineWebQualityFilter

    filter_ = FineWebQualityFilter(
        line_punct_thr=settings.line_punctuation or 0.0,
        short_line_thr=at_most(settings.short_lines),
        short_line_length=settings.short_line_chars,
        char_duplicates_ratio=at_most(settings.duplicate_chars),
        new_line_ratio=at_most(settings.newline_words),
    )
    return checked(filter_, words)


def at_most(limit: float | None) -> float:
    """Returns a largest share; where there is none, a number that no share exceeds."""
    return math.inf if limit is None else limit
