"""Whole documents in rows: nothing lost, few cut, as full as best fit makes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.data import whole
from llmtrain.data.packing import best_fit
from llmtrain.data.whole import made, pieces, plan_rows, row_of


def offsets_of(lengths: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def test_pieces_by_hand() -> None:
    """A document of 10 tokens has 9 positions: 4 + 4 + 1; one of 1 token has none."""
    starts, lengths = pieces(offsets_of([10, 1, 5, 2]), 4)
    assert starts.tolist() == [0, 4, 8, 11, 16] and lengths.tolist() == [4, 4, 1, 4, 1]


def test_a_plan_by_hand() -> None:
    """Positions 6 5 4 3 2 in rows of 10: 6 + 4 and 5 + 3 + 2, without padding."""
    plan = made(offsets_of([3, 6, 7, 4, 5]), 10)
    assert plan.lengths.tolist() == [6, 4, 5, 3, 2] and plan.rows.tolist() == [0, 2, 5]
    assert plan.starts.tolist() == [9, 20, 3, 16, 0] and plan.padding(10) == 0.0
    assert made(offsets_of([6, 5]), 8).padding(8) == pytest.approx(7 / 16)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 70), min_size=1, max_size=90), st.integers(1, 40))
def test_it_is_best_fit_and_loses_nothing(documents: list[int], seq_len: int) -> None:
    offsets = offsets_of(documents)
    plan, (starts, lengths) = made(offsets, seq_len), pieces(offsets, seq_len)
    assert sorted(zip(plan.starts, plan.lengths, strict=True)) == sorted(zip(starts, lengths, strict=True))
    filled = sorted(int(plan.lengths[a:b].sum()) for a, b in zip(plan.rows[:-1], plan.rows[1:], strict=True))
    falling = sorted(lengths.tolist(), reverse=True)
    assert filled == sorted(sum(falling[i] for i in row) for row in best_fit(falling, seq_len))
    assert all(0 < n <= seq_len for n in filled)
    tokens, seen = np.arange(offsets[-1]), []
    for row in range(len(plan)):
        ids, labels, positions, piece = row_of(plan, row, tokens)
        assert np.array_equal(labels, ids + 1) and (positions[np.diff(piece, prepend=-1) > 0] == 0).all()
        seen += labels.tolist()
    assert sorted(seen) == sorted(set(range(int(offsets[-1]))) - set(offsets[:-1].tolist()))  # all but the first tokens


def test_a_million_documents_take_no_long_time_and_no_padding() -> None:
    drawn = np.exp(np.random.default_rng(0).normal(6.2, 1.2, 200_000)).astype(np.int64) + 2
    plan = made(offsets_of(drawn.tolist()), 4096)
    assert plan.padding(4096) < 0.001


def test_large_plans_are_kept_and_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "KEPT_PIECES", 3)
    offsets = offsets_of([9, 4, 6, 2, 7])
    first = plan_rows(offsets, 8, str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 3
    monkeypatch.setattr(whole, "made", lambda *_: pytest.fail("computed again"))
    again = plan_rows(offsets, 8, str(tmp_path))
    assert isinstance(again.starts, np.memmap) and again.positions == first.positions
    for name in ("starts", "lengths", "rows"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
    with pytest.raises(BaseException, match="computed again"):
        plan_rows(offsets, 9, str(tmp_path))
    with pytest.raises(BaseException, match="computed again"):
        plan_rows(offsets_of([9, 4, 6, 3, 6]), 8, str(tmp_path))


def test_where_nothing_can_be_written_the_plan_stays_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "KEPT_PIECES", 0)
    assert len(plan_rows(offsets_of([9, 4]), 8, "/proc/none")) == 2
