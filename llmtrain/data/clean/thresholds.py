"""Gives thresholds to datatrove's filters."""

from __future__ import annotations

import sys
from collections.abc import Callable

from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter

from llmtrain.config.clean.web import WordsConfig
from llmtrain.data.clean.step import Check
from llmtrain.data.clean.words import splitter


def above(limit: float | None) -> float | None:
    """Returns a largest share as Gopher's filters of datatrove take it: for them 0 is off, as None is."""
    return sys.float_info.min if limit == 0 else limit


def checked(
    filter_: BaseFilter, words: WordsConfig, prepare: Callable[[Document], None] = lambda document: None
) -> Check:
    """Returns the check that asks a filter of datatrove about a document's text, split by its language.

    Reasons are the filter's own, `no_splitter` where the language has none, and `empty` where the text has no words, of
    which no share can be taken.
    """

    def check(document: Document) -> str | None:
        if (language := splitter(document, words)) is None:
            return "no_splitter"
        if not document.text.strip():
            return "empty"
        filter_.language = language
        prepare(document)
        verdict = filter_.filter(document)
        return None if verdict is True else verdict[1]

    return check
