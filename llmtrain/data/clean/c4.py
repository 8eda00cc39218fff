"""Keeps lines and pages as C4 does (arXiv 1910.10683, section 2.2)."""

from __future__ import annotations

from llmtrain.config.clean.web import C4Config, WordsConfig
from llmtrain.data.clean.step import Check
from llmtrain.data.clean.thresholds import checked


def make(settings: C4Config, words: WordsConfig) -> Check:
    """Returns a check with the decisions and reasons of datatrove's filter: `lorem_ipsum`, `curly_bracket`,
    `too_few_sentences`; `empty` where no line stays. The lines that stay are the document's new text."""
    from datatrove.pipeline.filters.c4_filters import C4QualityFilter

    filter_ = C4QualityFilter(
        remove_citations=settings.citations,
        filter_no_terminal_punct=settings.terminal_punctuation,
        min_num_sentences=settings.min_sentences or -1,
        min_words_per_line=settings.min_line_words or -1,
        max_word_length=settings.max_word_chars or -1,
        filter_lorem_ipsum=settings.lorem_ipsum,
        filter_javascript=settings.javascript,
        filter_curly_bracket=settings.curly_bracket,
        filter_policy=settings.policy,
    )
    kept = checked(filter_, words)
    return lambda document: kept(document) or (None if document.text else "empty")
