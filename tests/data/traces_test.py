"""Answers of demonstrations: where they are, and whether they think and then answer."""

from __future__ import annotations

import pytest

from llmtrain.data.encode import Encoded
from llmtrain.data.rows import Example
from llmtrain.data.traces import answer_span, thinks_and_answers


@pytest.mark.parametrize(
    ("trained", "span"),
    [("0110011", (5, 7)), ("01100", (1, 3)), ("11", (0, 2)), ("000", (0, 0)), ("", (0, 0))],
)
def test_the_answer_is_the_last_that_is_trained(trained: str, span: tuple[int, int]) -> None:
    flags = [flag == "1" for flag in trained]
    assert answer_span(Encoded("f:1", Example({}), list(range(len(flags))), flags)) == span


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("<think>1 + 1</think> 2", True),
        ("1 + 1\n</think>\n\n2", True),  # the prompt has opened it
        ("<think>a</think> b </think> c", True),
        (" 2", False),
        ("", False),
        ("<think>1 + 1", False),
        ("<think>1 + 1</think>", False),
        ("<think>1 + 1</think>\n", False),
        ("<think>\n\n</think>\n\n2", False),
        ("</think> 2", False),
        ("<think>1</think> so <think>2", False),
    ],
)
def test_an_answer_that_thinks_and_then_says_something(text: str, whole: bool) -> None:
    assert thinks_and_answers(text) == whole
