"""Ranks passages by BM25, with bm25s (arXiv 2407.03618): the scores of all words are computed when a store is built.

The score is Lucene's: each word of the question adds log(1 + (N - n + 0.5) / (n + 0.5)) f / (f + k1 (1 - b + b L / A)),
where n of N passages hold the word, f times in this one, which has L words, and passages have A in the mean.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from llmtrain.data.search.words import words_of

SCORES, VOCABULARY = "bm25.safetensors", "vocabulary.json"
ARRAYS = ("data", "indices", "indptr")  # a sparse matrix by columns: passages x words


class Bm25:
    """Holds the scores of all words in all passages."""

    def __init__(self, arrays: dict[str, NDArray], vocabulary: list[str], num_passages: int) -> None:
        import bm25s  # the extra `search`

        self.vocabulary = {word: i for i, word in enumerate(vocabulary)}
        self.ranker = bm25s.BM25(method="lucene", backend="numpy")
        self.ranker.scores = {**arrays, "num_docs": num_passages}
        self.ranker.nonoccurrence_array = None  # Lucene's BM25 gives nothing for words that are not there

    def scores(self, question: str) -> NDArray[np.float32]:
        """Returns the score of each passage, 0 where it holds no word of the question; a word asked twice counts
        twice."""
        ids = [self.vocabulary[word] for word in words_of(question) if word in self.vocabulary]
        return self.ranker.get_scores_from_ids(ids)


def write_bm25(directory: Path, texts: Iterable[str], k1: float, b: float) -> int:
    """Writes the scores of all words in `texts`; returns how many different words there are. Raises ValueError when
    there is none."""
    import bm25s

    numbers: dict[str, int] = {}
    ids = [[numbers.setdefault(word, len(numbers)) for word in words_of(text)] for text in texts]
    if not numbers:
        raise ValueError("the documents hold no word, so nothing could be found in them; index others")
    ranker = bm25s.BM25(k1=k1, b=b, method="lucene", backend="numpy", csc_backend="numpy")
    ranker.index((ids, numbers), create_empty_token=False, show_progress=False)
    save_file({name: np.ascontiguousarray(ranker.scores[name]) for name in ARRAYS}, directory / SCORES)
    (directory / VOCABULARY).write_text(json.dumps(list(numbers), ensure_ascii=False), encoding="utf-8")
    return len(numbers)


def read_bm25(directory: Path, num_passages: int) -> Bm25:
    """Returns what `write_bm25` wrote."""
    vocabulary = json.loads((directory / VOCABULARY).read_text(encoding="utf-8"))
    return Bm25(load_file(directory / SCORES), vocabulary, num_passages)
