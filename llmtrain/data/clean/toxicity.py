"""Drops documents by word lists in their language, and English by a model of profanity.

The model is alt-profanity-check (extra `toxicity`): a linear classifier over words, which loads its weights with joblib
from its own package. That is unpickling, which runs what the package says, so it is off unless it is asked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from datatrove.data import Document

from llmtrain.config.clean.content import ToxicityConfig
from llmtrain.config.clean.web import WordsConfig
from llmtrain.data.clean.step import Check
from llmtrain.data.clean.wordlist import read_lists
from llmtrain.data.clean.words import base

Judge = Callable[[Sequence[str]], Sequence[float]]
LINE_CHARS = 10_000  # a longer line is judged in parts


def make(settings: ToxicityConfig, words: WordsConfig) -> Check:
    """Returns the check. It sets the metadata `toxic_words` and `toxic_share` where the language has a list, and
    `profane_share` in English with the model. Raises ValueError when the lists or the extra are missing."""
    return Toxicity(settings, profanity() if settings.model else None)


def profanity() -> Judge:
    """Returns the model's probabilities of texts. Raises ValueError when the extra is not installed."""
    try:
        from profanity_check import predict_prob
    except ImportError:
        raise ValueError(
            "data.clean.toxicity.model=true: needs the extra `toxicity`; pip install llmtrain[toxicity], or set false"
        ) from None
    return predict_prob


class Toxicity:
    """Judges documents. `counts` holds by language how many had no list, so that nothing passes in silence."""

    def __init__(self, settings: ToxicityConfig, judge: Judge | None) -> None:
        self.settings, self.judge, self.counts = settings, judge, Counter[str]()
        self.lists = read_lists(settings.word_lists) if settings.word_lists is not None else {}

    def __call__(self, document: Document) -> str | None:
        """Returns why the document is dropped: `listed_words`, `no_word_list`, `profane`."""
        language = document.metadata.get("language") or "unknown"
        reason = self.by_list(document, language) if self.settings.word_lists is not None else None
        if reason is None and self.judge is not None and base(language) == "en":
            reason = self.by_model(document, self.judge)
        return reason

    def by_list(self, document: Document, language: str) -> str | None:
        """Returns why a document is dropped by the list of its language."""
        language = language if language in self.lists else base(language)  # en-US, EN
        if language not in self.lists:
            self.counts[f"no_word_list/{language}"] += 1
            return "no_word_list" if self.settings.missing == "drop" else None
        count, share = self.lists[language].found(document.text)
        document.metadata |= {"toxic_words": count, "toxic_share": round(share, 6)}
        many = count > self.settings.max_counts.get(language, self.settings.max_count)
        return (
            "listed_words" if many and share > self.settings.max_shares.get(language, self.settings.max_share) else None
        )

    def by_model(self, document: Document, judge: Judge) -> str | None:
        """Returns why a document is dropped by the model, which judges line by line."""
        lines = [
            line[i : i + LINE_CHARS] for line in document.text.splitlines() for i in range(0, len(line), LINE_CHARS)
        ]
        lines = [line for line in lines if line.strip()]
        profane = sum(p >= self.settings.model_threshold for p in judge(lines)) / len(lines) if lines else 0.0
        document.metadata["profane_share"] = round(float(profane), 6)
        return "profane" if profane > self.settings.model_share else None
