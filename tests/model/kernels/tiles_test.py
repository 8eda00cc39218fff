"""Checks attention by tiles against the masked formula: what is computed, its output, and its gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmtrain.model.attention import attention_mask
from llmtrain.model.kernels import tile_plan
from llmtrain.model.kernels.sdpa import attention, plain_attention
from llmtrain.model.kernels.tile_plan import Span, Tiles, plan_tiles, whole_row
from llmtrain.model.kernels.tiles import attend_tiles, tile_side
from llmtrain.parallel.zigzag import places, spans
from tests.model.kernels.backends_test import BRANCHED, CAUSAL, PACKED, TREED, Ids, T, drawn_nodes, heads, packed, treed

SAME = {torch.float32: 2e-6, torch.bfloat16: 1e-2}  # of the whole tensor; fp32: sums in another order; seen: 4e-7


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tile_plan, "WINDOW_TOKENS", 16)


@st.composite
def rows(draw: st.DrawFn) -> tuple[Ids, int | None]:
    """Draws documents or a tree in a row of 48 places, and perhaps a window."""
    cuts = sorted(draw(st.lists(st.integers(0, 48), min_size=1, max_size=6)))
    lengths = [b - a for a, b in zip([0, *cuts], cuts, strict=False)]
    window = draw(st.none() | st.integers(1, 40))
    return (treed(drawn_nodes(draw, lengths), 48) if draw(st.booleans()) else packed([lengths], 48)), window


def scored(plan: Tiles, queries: Tensor, keys: Tensor) -> Tensor:
    """Returns how often the tiles score each query and key of a row, [queries, keys], as they lie in the tensors."""
    counts = torch.zeros(len(queries), len(keys), dtype=torch.int64)
    for tile in plan.tiles:
        (a, b, at), (c, d, of) = tile.queries, tile.keys
        assert torch.equal(queries[at : at + b - a], torch.arange(a, b))
        assert torch.equal(keys[of : of + d - c], torch.arange(c, d))
        seen = torch.ones(b - a, d - c, dtype=torch.bool)
        seen = seen.tril() if tile.causal else seen
        mask = plan.mask(tile, seen.device)
        counts[at : at + b - a, of : of + d - c] += seen if mask is None else mask
    return counts


@settings(max_examples=60, deadline=None, database=None)
@given(rows(), st.sampled_from([None, 5]), st.sampled_from([1, 2, 4]))
def test_every_pair_that_is_seen_is_scored_once(drawn: tuple[Ids, int | None], side: int | None, cp: int) -> None:
    """The queries of a rank and the keys of each, or of the whole row."""
    (segments, ends, positions), window = drawn
    real = segments[0] >= 0
    expected = (attention_mask(segments, ends, positions=positions, window=window)[0, 0] & real[:, None]).long()
    whole, n = torch.arange(48), 48 // cp
    for rank in range(cp):
        mine = places(rank, cp, n, whole.device)
        sources = [(whole, whole_row(48))] + [(places(r, cp, n, whole.device), spans(r, cp, n)) for r in range(cp)]
        for keys, key_spans in sources:
            plan = plan_tiles(segments, ends, positions, window, spans(rank, cp, n), key_spans, side)
            assert torch.equal(scored(plan, mine, keys), expected[mine][:, keys])


def test_the_work_is_the_sum_of_squares_of_documents() -> None:
    segments, _, positions = packed([[70, 50, 20]], T)
    plan = plan_tiles(segments, None, positions, None, whole_row(T), whole_row(T))
    assert [(t.queries, t.keys, t.causal) for t in plan.tiles] == [
        (span, span, True) for span in (Span(0, 70, 0), Span(70, 120, 70), Span(120, 140, 120))
    ]
    segments, ends, positions = BRANCHED  # a trunk of 40, samples of 30, 60 and 10
    plan = plan_tiles(segments, ends, positions, None, whole_row(T), whole_row(T))
    found = [(t.queries[:2], t.keys[:2], t.causal) for t in plan.tiles]
    runs = [(40, 70), (70, 130), (130, 140)]
    pairs = [pair for run in runs for pair in ((run, (0, 40), False), (run, run, True))]
    assert found == [((0, 40), (0, 40), True), *pairs]


def test_a_window_costs_its_width() -> None:
    positions = torch.arange(256)[None]
    plan = plan_tiles(None, None, positions, 20, whole_row(256), whole_row(256))
    assert max(t.keys.stop - t.keys.first for t in plan.tiles) == 16 + 20 - 1


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("ids", [PACKED, TREED, CAUSAL], ids=["packed", "tree", "causal"])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (24, None), (None, 2.0), (24, 2.0)])
@pytest.mark.parametrize(("dtype", "value_width"), [(torch.float32, 16), (torch.float32, 12), (torch.bfloat16, 24)])
def test_output_and_gradients(
    ids: Ids, window: int | None, softcap: float | None, dtype: torch.dtype, value_width: int
) -> None:
    segments, ends, positions = ids
    rows = positions.size(0)
    g = torch.Generator().manual_seed(1)
    q, k, v = heads(rows, 16, dtype)
    v = torch.randn(rows, 2, T, value_width, generator=g).to(dtype)
    real = (torch.ones(rows, T) if segments is None else (segments >= 0).float())[:, None, :, None]
    grad = torch.randn(rows, T, 4, value_width, generator=g).to(dtype).transpose(1, 2) * real.to(dtype)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    side = tile_side(q.device, softcap) and 32
    plan = plan_tiles(segments, ends, positions, window, whole_row(T), whole_row(T), side)
    out = attend_tiles(*inputs, plan, softcap)
    exact = [x.detach().float().requires_grad_() for x in inputs]
    everywhere = torch.zeros_like(positions) if segments is None else segments
    mask = attention_mask(everywhere, ends, positions=positions, window=window)
    expected = (attention if softcap is None else plain_attention)(*exact, mask, softcap)
    assert out.dtype == dtype and (out * (1 - real)).eq(0).all()
    pairs = [(out * real, expected * real)]
    gradients = torch.autograd.grad(out, inputs, grad)
    pairs += zip(gradients, torch.autograd.grad(expected, exact, grad.float()), strict=True)
    assert all(relative(a.detach(), b.detach()) <= SAME[dtype] for a, b in pairs)
