"""Which piece lies in which row of which microbatch: nothing lost, one shape, little padding."""

from __future__ import annotations

import random
from itertools import chain, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.arch.resolve import resolve_model, train_flops_per_token
from llmtrain.config.schema import ModelConfig
from llmtrain.data.microbatches import Layout, Limits, best_fit_within, plan_fixed, plan_microbatches
from llmtrain.data.packing import best_fit

SEQ = 1024


def cost(width: int) -> float:
    return 1 + width / 1000


def places(layout: Layout) -> list[int]:
    return sorted(chain.from_iterable(row for rows in layout.microbatches for row in rows))


def positions(layout: Layout) -> int:
    return len(layout.microbatches) * len(layout.microbatches[0]) * layout.width


def check(layout: Layout, lengths: list[int], limits: Limits) -> None:
    """What holds for every layout: each piece once, one shape, every limit."""
    assert places(layout) == list(range(len(lengths)))
    (rows,) = {len(microbatch) for microbatch in layout.microbatches}
    assert all(sum(lengths[i] for i in row) <= layout.width for each in layout.microbatches for row in each)
    assert rows * layout.width <= limits.tokens and layout.width <= limits.row_tokens
    assert layout.width % limits.multiple == 0 or layout.width == limits.row_tokens
    assert len(layout.microbatches) % limits.dp == 0 and len(layout.microbatches) >= limits.dp * limits.pp


def first_fit(lengths: list[int], limits: Limits) -> tuple[int, int]:
    """(microbatches, positions) of rows as wide as the longest piece, in microbatches of a fixed number of rows."""
    width, micro = limits.width(max(lengths)), limits.tokens // limits.row_tokens
    rows = len(best_fit(sorted(lengths, reverse=True), width))
    count = max(limits.pp, -(-rows // (micro * limits.dp))) * limits.dp
    return count, count * micro * width


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, SEQ), min_size=1, max_size=60),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 3, 8]),
    st.sampled_from([1, 2, 4]),
    st.booleans(),
)
def test_whatever_is_drawn(lengths: list[int], micro: int, dp: int, pp: int, odd: bool) -> None:
    limits = Limits(micro * SEQ, SEQ, 48 if odd else 16, dp, pp)  # 48 does not divide a row
    layout = plan_microbatches(lengths, lengths, limits, cost)
    check(layout, lengths, limits)
    assert layout == plan_microbatches(lengths, lengths, limits, cost)
    count, before = first_fit(lengths, limits)
    wide = limits.width(max(lengths))
    spared = 16 * max(0, count - len(layout.microbatches)) * cost(wide)  # microbatches less are worth so much
    assert positions(layout) * cost(layout.width) <= before * cost(wide) + spared + 1e-6
    check(plan_fixed(lengths, lengths, limits, micro), lengths, limits)


SMALL = resolve_model(ModelConfig(num_layers=30, hidden_size=576, ffn_size=1536, num_heads=9, num_kv_heads=3))


@pytest.mark.parametrize("spread", [0.1, 0.3, 0.6])
@pytest.mark.parametrize("median", [20, 100, 250])
def test_padding_is_at_most_a_tenth(median: int, spread: float) -> None:
    """Mixes of 20 to 48 pieces a pipeline stage and rank, the longest a quarter of a row, for a model of 135M
    parameters."""
    rng, padding = random.Random(median), []
    for dp, pp, micro in product((1, 2, 4), (1, 2), (1, 4)):
        draws = [rng.lognormvariate(0, spread) for _ in range(rng.randint(20, 48) * dp * pp)]
        lengths = [min(512, max(2, int(median * draw))) for draw in draws]
        limits = Limits(micro * 2048, 2048, 16, dp, pp)
        layout = plan_microbatches(lengths, lengths, limits, lambda width: train_flops_per_token(SMALL, 2 * width))
        check(layout, lengths, limits)
        padding.append(1 - sum(lengths) / positions(layout))
    assert max(padding) <= 0.1 and sum(padding) / len(padding) < 0.06, padding


def test_a_layout_by_hand() -> None:
    """100 + 28, 90 + 38 and 80 + 48 make three rows of 128; with two ranks a fourth is needed, and 112 is enough."""
    lengths = [28, 80, 100, 38, 90, 48]
    alone = plan_microbatches(lengths, lengths, Limits(512, 512, 16, 1, 1), cost)
    assert alone == ([[[2, 0], [4, 3], [1, 5]]], 128)
    two = plan_microbatches(lengths, lengths, Limits(512, 512, 16, 2, 1), cost)
    assert two.width == 112 and [len(rows) for rows in two.microbatches] == [2, 2]
    assert plan_microbatches(lengths, lengths, Limits(512, 512, 16, 1, 3), cost).microbatches == [
        [[2, 0]],
        [[4, 3]],
        [[1, 5]],
    ]
    assert plan_fixed(lengths, lengths, Limits(512, 256, 16, 1, 1), 1) == ([[[2, 4, 5]], [[1, 3, 0]]], 256)
    assert plan_microbatches([], [], Limits(512, 512, 16, 2, 3), cost) == ([[[]]] * 6, 16)


def test_short_rows_where_attention_computes_all_scores() -> None:
    """Eight pieces of 100: in one row of 800 every token has 800 scores; where those cost nothing padding decides."""
    limits = Limits(1024, 1024, 16, 1, 1)
    assert plan_microbatches([100] * 8, [1] * 8, limits, cost) == ([[[i] for i in range(8)]], 112)
    assert plan_microbatches([100] * 8, [1] * 8, limits, lambda width: 1.0) == ([[[*range(8)]]], 800)


def test_rows_are_dealt_by_their_work() -> None:
    """Four rows of one piece: the two heavy ones go to different ranks, 9 + 2 and 9 + 1."""
    layout = plan_microbatches([64] * 4, [9, 9, 1, 2], Limits(128, 64, 64, 2, 1), cost)
    assert layout.microbatches == [[[0], [3]], [[1], [2]]]


@pytest.mark.parametrize(("rows", "expected"), [(2, [[0, 2], [1, 3, 4]]), (1, None)])
def test_best_fit_within_a_number_of_rows(rows: int, expected: list | None) -> None:
    assert best_fit_within([6, 5, 4, 3, 2], rows, 10) == expected
