"""Drops documents that repeat themselves, by Gopher's rules (arXiv 2112.11446, table A1)."""

from __future__ import annotations

from datatrove.data import Document
from datatrove.utils.text import split_into_words
from datatrove.utils.word_tokenizers import WordTokenizer

from llmtrain.config.clean.web import RepetitionConfig, WordsConfig
from llmtrain.data.clean.repeats import Grams
from llmtrain.data.clean.step import Check
from llmtrain.data.clean.thresholds import above, checked


def make(settings: RepetitionConfig, words: WordsConfig) -> Check:
    """Returns a check with the decisions and reasons of datatrove's filter: `dup_para_frac`, `dup_para_char_frac`,
    `dup_line_frac`, `dup_line_char_frac`, `top_2_gram` to `top_4_gram`, `duplicated_5_n_grams` to `..._10_n_grams`."""
    from datatrove.pipeline.filters.gopher_repetition_filter import GopherRepetitionFilter

    class Repetition(GopherRepetitionFilter):
        """Has the n-grams measured by numpy."""

        def filter(self, document: Document) -> bool | tuple[bool, str]:
            verdict = super().filter(document)
            return verdict if verdict is not True else grams_verdict(document.text, self.language, settings)

    filter_ = Repetition(
        dup_line_frac=above(settings.duplicate_lines),
        dup_para_frac=above(settings.duplicate_paragraphs),
        dup_line_char_frac=above(settings.duplicate_line_chars),
        dup_para_char_frac=above(settings.duplicate_paragraph_chars),
        top_n_grams=(),
        dup_n_grams=(),
    )
    return checked(filter_, words)


def grams_verdict(text: str, language: WordTokenizer, settings: RepetitionConfig) -> bool | tuple[bool, str]:
    """Returns whether the n-grams of a text repeat little enough, with the reason if not."""
    grams = Grams(split_into_words(text, language))
    for n in (2, 3, 4):
        limit = getattr(settings, f"top_{n}_gram")
        if limit is not None and grams.top_chars(n) / len(text) > limit:
            return False, f"top_{n}_gram"
    for n in range(5, 11):
        limit = getattr(settings, f"duplicate_{n}_grams")
        if limit is not None and grams.duplicate_chars(n) / len(text) > limit:
            return False, f"duplicated_{n}_n_grams"
    return True
