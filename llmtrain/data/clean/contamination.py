"""Drops or cuts documents that hold n-grams of the problems that models are evaluated on (arXiv 2005.14165, C)."""

from __future__ import annotations

from collections import Counter

import numpy as np
from datatrove.data import Document

from llmtrain.config.clean.content import ContaminationConfig
from llmtrain.config.clean.web import WordsConfig
from llmtrain.data.clean.evaluation_sets import build_index
from llmtrain.data.clean.ngrams import WORD, in_sorted, ngram_hashes, word_hashes
from llmtrain.data.clean.step import Check

REASON = "contaminated"


def make(settings: ContaminationConfig, words: WordsConfig) -> Check:
    """Returns the check. What is found is named in the metadata `contaminated_by`. Raises ValueError when a set cannot
    be read."""
    return Decontaminator(settings)


class Decontaminator:
    """Looks n-grams of documents up in the index of the sets. `counts` holds the documents found, by set."""

    def __init__(self, settings: ContaminationConfig) -> None:
        self.settings, self.index, self.counts = settings, build_index(settings), Counter[str]()

    def __call__(self, document: Document) -> str | None:
        """Returns why a document is dropped; cuts passages out of its text where that is asked for."""
        hits = self.hits(document.text)
        if not hits:
            return None
        names = [self.index.names[owner] for owner in sorted({owner for _, _, owner in hits})]
        document.metadata["contaminated_by"] = names
        self.counts.update(f"documents_with/{name}" for name in names)
        pieces = self.pieces(document.text, hits) if self.settings.action == "cut" else []
        if not 0 < len(pieces) <= self.settings.max_pieces:
            return REASON
        self.counts["documents_cut"] += 1
        document.text = "\n\n".join(pieces)
        return None

    def hits(self, text: str) -> list[tuple[int, int, int]]:
        """Returns (first word, words, number of the set) of every n-gram that is in the index."""
        found: list[tuple[int, int, int]] = []
        if not self.index.hashes:
            return found
        hashes = word_hashes(WORD.findall(text))
        for words, keys in self.index.hashes.items():
            places = in_sorted(keys, ngram_hashes(hashes, words))
            at = np.flatnonzero(places >= 0)
            owners = self.index.owners[words][places[at]]
            found += [(int(i), words, int(owner)) for i, owner in zip(at, owners, strict=True)]
        return sorted(found)

    def pieces(self, text: str, hits: list[tuple[int, int, int]]) -> list[str]:
        """Returns what is left of a text without the hits and `cut_chars` around them, in pieces that are not
        shorter."""
        places, margin = [match.span() for match in WORD.finditer(text)], self.settings.cut_chars
        pieces, at = [], 0
        for first, words, _ in hits:
            pieces.append(text[at : max(at, places[first][0] - margin)])
            at = max(at, places[first + words - 1][1] + margin)
        pieces.append(text[at:])
        return [piece.strip() for piece in pieces if len(piece.strip()) >= max(1, margin)]
