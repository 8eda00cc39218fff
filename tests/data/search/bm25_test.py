"""BM25 against the formula, worked by hand."""

from __future__ import annotations

from math import log
from pathlib import Path

import pytest

from llmtrain.data.search.bm25 import read_bm25, write_bm25

pytest.importorskip("bm25s", reason="the extra `search` installs it")

TEXTS = ["the cat sat", "the dog sat on the dog", "birds"]  # 3, 6 and 1 words: 10/3 in the mean


def test_scores_are_those_of_the_formula(tmp_path: Path) -> None:
    assert write_bm25(tmp_path, TEXTS, k1=1.2, b=0.75) == 6
    ranker = read_bm25(tmp_path, 3)
    # "dog" stands in 1 of 3 texts, there twice among 6 words; "the" in two
    dog = log(1 + 2.5 / 1.5) * 2 / (2 + 1.2 * (0.25 + 0.75 * 6 / (10 / 3)))
    assert dog == pytest.approx(0.98083 * 2 / 3.92, abs=1e-5)
    assert ranker.scores("Dog?").tolist() == pytest.approx([0, dog, 0], abs=1e-6)
    idf = log(1 + 1.5 / 2.5)
    the = [idf * 1 / (1 + 1.2 * (0.25 + 0.75 * 0.9)), idf * 2 / (2 + 1.2 * (0.25 + 0.75 * 1.8)), 0]
    assert ranker.scores("the").tolist() == pytest.approx(the, abs=1e-6)
    assert ranker.scores("the dog the").tolist() == pytest.approx([2 * the[0], 2 * the[1] + dog, 0], abs=1e-6)


def test_words_that_are_not_there_score_nothing(tmp_path: Path) -> None:
    write_bm25(tmp_path, [*TEXTS, "!!!"], k1=1.2, b=0.75)
    ranker = read_bm25(tmp_path, 4)
    assert ranker.scores("zebra").tolist() == ranker.scores("").tolist() == [0, 0, 0, 0]


def test_b_zero_leaves_the_length_out(tmp_path: Path) -> None:
    write_bm25(tmp_path, TEXTS, k1=2.0, b=0.0)
    assert read_bm25(tmp_path, 3).scores("cat").tolist() == pytest.approx([log(1 + 2.5 / 1.5) / 3, 0, 0], abs=1e-6)


def test_the_files_are_the_same_every_time(tmp_path: Path) -> None:
    """bm25s numbers words by a set, whose order changes from process to process; here they keep their own."""
    write_bm25(tmp_path, TEXTS, k1=1.2, b=0.75)
    assert (tmp_path / "vocabulary.json").read_text() == '["the", "cat", "sat", "dog", "on", "birds"]'


def test_no_word_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hold no word"):
        write_bm25(tmp_path, ["...", "--"], k1=1.2, b=0.75)
