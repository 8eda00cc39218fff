from __future__ import annotations

import pytest

from llmtrain.eval import sharing
from llmtrain.eval.sharing import Node, Packed, batches, merged, packed, plan


def test_a_row_that_begins_another_is_no_leaf() -> None:
    rows = [(5,), (7, 1), (5, 6, 2), (5, 6), (7, 1), (5, 6, 3)]
    assert merged(rows) == ([(5, 6, 2), (5, 6, 3), (7, 1)], [0, 2, 0, 0, 2, 1])
    assert merged([]) == ([], [])


def test_a_tree_in_a_row_by_hand() -> None:
    """5 6 then 7, or 8 and 9 or 4; the stem holds the 1 in front of all. What is shared twice is there once."""
    leaves = [(1, 5, 6, 7), (1, 5, 6, 8, 4), (1, 5, 6, 8, 9)]
    row = packed(leaves, [0, 3, 4], stem=1, chosen=range(3))
    assert row.ids == [5, 6, 7, 8, 4, 9]
    assert row.positions == [1, 2, 3, 3, 4, 4]
    assert row.ends == [6, 6, 3, 6, 5, 6]  # 8 is seen by 4 and 9, 4 by itself alone
    assert row.paths == [[0, 1, 2], [0, 1, 3, 4], [0, 1, 3, 5]]


def shape(node: Node) -> tuple[int, list[range], list]:
    return node.tokens, [row.leaves for row in node.rows], [shape(each) for each in node.stems]


def test_examples_are_a_stem_and_questions_are_rows() -> None:
    """Two questions of 30 tokens behind 500 of examples, with options of two tokens; and a row that shares nothing."""
    shots = tuple(range(500))
    rows = [(*shots, q, *range(30), q, option) for q in (600, 700) for option in (1, 2, 3)]
    root = plan(sorted([*rows, (9, 9)]), [530] * 6 + [0])
    assert shape(root) == (0, [range(6, 7)], [(500, [range(3, 6), range(3)], [])])
    assert [len(row.ids) for row in root.stems[0].rows] == [35, 35]


def test_a_place_that_is_asked_lies_in_no_stem() -> None:
    leaves = [(*range(600), option) for option in (1, 2)]
    assert shape(plan(leaves, [599, 599]))[2][0][0] == 599
    assert shape(plan(leaves, [100, 599]))[2][0][0] == 100
    assert shape(plan(leaves, [10, 599])) == (0, [range(1, 2), range(1)], [])  # too short to keep


def test_rows_that_share_little_are_apart() -> None:
    leaves = [(1, *range(a, a + 50)) for a in (100, 200, 300)]
    assert [row.leaves for row in plan(leaves, [10] * 3).rows] == [range(2, 3), range(1, 2), range(1)]


def test_nested_beginnings_need_no_recursion() -> None:
    """Each row goes one token further along the last one: a tree as deep as there are rows."""
    leaves = sorted((*range(1, n), 5000) for n in range(1, 500))
    tokens = sum(len(row.ids) for row in walk(plan(leaves, [0] * len(leaves))))
    assert tokens >= 2 * 499


def walk(node: Node) -> list[Packed]:
    return node.rows + [row for each in node.stems for row in walk(each)]


def test_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Packed(range(1), [0] * n) for n in (10, 3, 9, 8, 2)] + [Packed(range(2), [0] * 9)]
    widths = [[len(row.ids) for row in batch] for batch in batches(rows, 20)]
    assert widths == [[10, 9], [8, 3], [2], [9]]  # the last is a tree, with a mask
    monkeypatch.setattr(sharing, "ENOUGH_TOKENS", 5)
    assert [[len(row.ids) for row in batch] for batch in batches(rows, 1000)] == [[10, 9], [8], [3, 2], [9]]
    assert [len(batch) for batch in batches(rows, 1)] == [1] * 6  # a row is never cut
    assert list(batches([], 10)) == []
