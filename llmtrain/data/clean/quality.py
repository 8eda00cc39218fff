"""Drops documents by Gopher's rules of quality (arXiv 2112.11446, section A1.1)."""

from __future__ import annotations

from datatrove.data import Document

from llmtrain.config.clean.web import QualityConfig, WordsConfig
from llmtrain.data.clean.step import Check
from llmtrain.data.clean.thresholds import above, checked
from llmtrain.data.clean.words import base


def make(settings: QualityConfig, words: WordsConfig) -> Check:
    """Returns a check with the decisions and reasons of datatrove's filter: `gopher_short_doc`, `gopher_long_doc`,
    `gopher_below_avg_threshold` and so on. Where a language has no stop words, that rule is off."""
    from datatrove.pipeline.filters.gopher_quality_filter import GopherQualityFilter

    filter_ = GopherQualityFilter(
        min_doc_words=settings.min_words,
        max_doc_words=settings.max_words,
        min_avg_word_length=settings.min_mean_word_chars,
        max_avg_word_length=settings.max_mean_word_chars,
        max_symbol_word_ratio=above(settings.symbols),
        max_bullet_lines_ratio=above(settings.bullet_lines),
        max_ellipsis_lines_ratio=above(settings.ellipsis_lines),
        max_non_alpha_words_ratio=settings.alphabetic_words,
    )
    known: dict[str, frozenset[str]] = {}

    def prepare(document: Document) -> None:
        language = base(document.metadata.get("language") or words.language)
        if language not in known:
            known[language] = stop_words(language, settings)
        filter_.stop_words = known[language]
        filter_.min_stop_words = settings.min_stop_words if known[language] else None

    return checked(filter_, words, prepare)


def stop_words(language: str, settings: QualityConfig) -> frozenset[str]:
    """Returns the stop words of a language: those of the configuration, Gopher's eight in English, else spaCy's, which
    are some hundred; none where spaCy does not know the language."""
    from datatrove.pipeline.filters.gopher_quality_filter import STOP_WORDS
    from spacy.util import get_lang_class

    if language in settings.stop_words or language == "en":
        return frozenset(settings.stop_words.get(language, STOP_WORDS))
    try:
        return frozenset(get_lang_class(language).Defaults.stop_words)
    except ImportError:
        return frozenset()
