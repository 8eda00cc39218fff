"""Passages: where they end, what they repeat, and that nothing is lost."""

from __future__ import annotations

import random
import time
from itertools import pairwise

import pytest

from llmtrain.data.search.passages import Span, spans


def cut(text: str, size: int, overlap: int, tokens: list[tuple[int, int]] | None = None) -> list[str]:
    return [text[start:end] for start, end in spans(text, size, overlap, tokens)]


def words(text: str) -> list[tuple[int, int]]:
    """Returns the places of words, as a tokenizer that splits at spaces gives them."""
    places, at = [], 0
    for word in text.split():
        at = text.index(word, at)
        places.append((at, at + len(word)))
        at += len(word)
    return places


def test_a_short_document_is_one_passage_without_the_white_space_around_it() -> None:
    assert list(spans("\n  two words \n", 100, 10)) == [Span(3, 12)]
    assert list(spans("", 100, 10)) == list(spans(" \n\t\n", 3, 1)) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One two.\n\nThree four five.\nSix. Seven", ["One two.", "Three four five.", "Six. Seven"]),  # paragraphs
        ("One two three\nfour five six\nseven eight", ["One two three", "four five six", "seven eight"]),  # lines
        ("One two three. Four five six. Seven 8", ["One two three.", "Four five six.", "Seven 8"]),  # sentences
        (
            "一二三四五六七八。九十一二三四五六七八。",
            ["一二三四五六七八。", "九十一二三四五六七八。"],
        ),  # without spaces
        ("one two three four five six seven", ["one two three four", "five six seven"]),  # words
        ("abcdefghijklmnopqrstuvwxyz", ["abcdefghijklmnopqrst", "uvwxyz"]),  # within a word
    ],
)
def test_a_passage_ends_at_the_best_border_of_its_second_half(text: str, expected: list[str]) -> None:
    assert cut(text, 20 if "一" not in text else 12, 0) == expected


def test_a_passage_repeats_the_end_of_the_one_before_but_not_a_paragraph_that_ended() -> None:
    assert cut("one two three four five six seven eight", 20, 9) == [
        "one two three four",
        "four five six seven",
        "seven eight",
    ]
    assert cut("x" * 25, 20, 9) == ["x" * 20, "x" * 14]
    assert cut("One two three.\n\nFour five six.\n\nSeven", 20, 9) == ["One two three.", "Four five six.", "Seven"]


def test_tokens_are_counted_where_their_places_are_given() -> None:
    text = "a bb ccc dddd eeeee ffffff g"
    assert cut(text, 3, 0, words(text)) == ["a bb ccc", "dddd eeeee ffffff", "g"]
    assert cut(text, 3, 1, words(text)) == ["a bb ccc", "ccc dddd eeeee", "eeeee ffffff g"]


@pytest.mark.parametrize("counts_words", [False, True])
def test_nothing_is_lost_and_no_passage_is_too_long(counts_words: bool) -> None:
    """On random texts of borders of all kinds."""
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(
            rng.choice(["ab", "c", " ", "  ", "\n", "\n\n", ". ", "。", "é"]) for _ in range(rng.randrange(120))
        )
        size = rng.randrange(1, 25)
        overlap = rng.randrange(0, (size + 1) // 2)
        tokens = words(text) if counts_words else None
        found = list(spans(text, size, overlap, tokens))
        covered = {i for start, end in found for i in range(start, end)}
        assert {i for i, c in enumerate(text) if not c.isspace()} <= covered
        measured = [len(text[start:end].split()) if counts_words else end - start for start, end in found]
        assert all(0 < length <= size for length in measured), (text, size, overlap, found)
        assert all(a.start < b.start and a.end < b.end for a, b in pairwise(found))
        shared = [text[b.start : a.end] for a, b in pairwise(found) if b.start < a.end]
        assert all((len(s.split()) if counts_words else len(s)) <= overlap for s in shared)


def test_one_huge_line_takes_linear_time() -> None:
    start = time.process_time()
    assert len(cut("x" * 2_000_000, 1000, 150)) == 2353  # steps of 850
    assert len(cut(" " * 2_000_000, 1000, 150)) == 0
    assert len(cut("\n" * 2_000_000, 1_000_000, 0)) == 0
    assert time.process_time() - start < 3
