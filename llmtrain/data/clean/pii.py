"""Replaces personal data and secrets by typed placeholders, and counts them by kind.

Each kind has a finder, a function of a text that yields (start, end) of what is found. All of them take time linear in
the text, whatever stands in it: what they look at around each place is bounded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from datatrove.data import Document

from llmtrain.config.clean.content import PiiConfig
from llmtrain.config.clean.web import WordsConfig
from llmtrain.data.clean.pii_keys import find_keys
from llmtrain.data.clean.pii_network import find_emails, find_ips
from llmtrain.data.clean.pii_numbers import find_cards, find_ibans, find_ssns
from llmtrain.data.clean.pii_phones import find_phones
from llmtrain.data.clean.step import Check

Span = tuple[int, int]
Finder = Callable[[str], Iterator[Span]]


def make(settings: PiiConfig, words: WordsConfig) -> Check:
    """Returns the check, which drops nothing: it changes the text, and sets the metadata `pii`, counts by kind."""
    return Replacer(settings)


def finders(settings: PiiConfig) -> dict[str, Finder]:
    """Returns the finders in the order in which they run: what is surest first, as its digits are then gone."""
    every: dict[str, Finder] = {
        "key": lambda text: find_keys(text, settings.min_entropy),
        "email": find_emails,
        "iban": find_ibans,
        "ip": lambda text: find_ips(text, settings.private_ips),
        "card": find_cards,
        "ssn": find_ssns,
        "phone": find_phones,
    }
    return {kind: find for kind, find in every.items() if kind in settings.kinds}


class Replacer:
    """Replaces what the finders find in a document. `counts` holds the sums over all documents."""

    def __init__(self, settings: PiiConfig) -> None:
        self.finders, self.counts = finders(settings), Counter[str]()
        self.placeholders = {kind: settings.placeholders.get(kind, f"<{kind.upper()}>") for kind in self.finders}

    def __call__(self, document: Document) -> None:
        """Changes the document's text, and notes how much of each kind was replaced."""
        found = {}
        for kind, find in self.finders.items():
            document.text, number = replaced(document.text, find(document.text), self.placeholders[kind])
            if number:
                found[kind] = number
        document.metadata["pii"] = found
        self.counts.update({f"replaced/{kind}": number for kind, number in found.items()})
        self.counts["documents_with_pii"] += bool(found)


def replaced(text: str, spans: Iterable[Span], placeholder: str) -> tuple[str, int]:
    """Returns the text with a placeholder for every span, and their number. Of spans that overlap the first counts."""
    parts, at = [], 0
    for start, end in sorted(spans):
        if start >= at:
            parts += [text[at:start], placeholder]
            at = end
    return ("".join([*parts, text[at:]]), len(parts) // 2) if parts else (text, 0)
