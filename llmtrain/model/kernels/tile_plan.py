"""Lists the rectangles of scores that rows of documents, trees or a window need, so that nothing else is computed.

A row is a sequence of runs: tokens that follow each other with one segment and one of `ends` (see `types.Batch`). A run
sees itself causally, and all of an earlier run of its segment whose end lies behind; so what is seen is a square on the
diagonal for each run and a full rectangle for each such pair, without any mask. Only a window's edge needs one. Padding
(segment -1) is in no tile.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

WINDOW_TOKENS = 512  # queries of a tile that crosses a window's edge: the mask has so many more keys than the window


class Span(NamedTuple):
    """Describes neighbours in a row: its places first to stop, held in a tensor from index `index` on."""

    first: int
    stop: int
    index: int


class Tile(NamedTuple):
    """Describes queries and keys of one row between which scores are computed, by their places in the row."""

    row: int
    queries: Span
    keys: Span
    causal: bool = False  # a square on the diagonal: each query sees the keys up to itself; False = all of them
    windowed: bool = False  # places and positions decide


@dataclass(eq=False)
class Tiles:
    """Holds the tiles of a batch, in the order in which they are computed."""

    tiles: list[Tile]
    positions: Tensor | None = None  # [B, T], with a window
    window: int | None = None

    def mask(self, tile: Tile, device: torch.device) -> Tensor | None:
        """Returns which query sees which key, bool [queries, keys]; None = as `tile.causal` says."""
        if not tile.windowed:
            return None
        assert self.positions is not None and self.window is not None
        (a, b, _), (c, d, _) = tile.queries, tile.keys
        places, positions = torch.arange(max(b, d), device=device), self.positions[tile.row].to(device)
        near = positions[a:b, None] - positions[c:d] < self.window
        return near & (places[a:b, None] >= places[c:d])


class Run(NamedTuple):
    first: int
    stop: int
    segment: int
    end: int


def plan_tiles(
    segment_ids: Tensor | None,
    ends: Tensor | None,
    positions: Tensor,
    window: int | None,
    queries: Sequence[Span],
    keys: Sequence[Span],
    side: int | None = None,
) -> Tiles:
    """Returns the tiles between `queries` and `keys` of rows whose ids and ends are [B, T]. It waits for the device.

    Spans of queries and of keys are the same, apart, or the keys are all of the row. `side`: the most queries and keys
    of a tile.
    """
    segments = torch.zeros_like(positions) if segment_ids is None else segment_ids
    ends = torch.full_like(positions, positions.size(1)) if ends is None else ends
    rows = zip(segments.cpu(), ends.cpu(), positions.cpu(), strict=True)
    tiles = []
    for row, (segment, end, position) in enumerate(rows):
        found = _seen(_runs(segment, end), queries, keys, row)
        if window is not None:
            found = (part for tile in found for part in _near(tile, position, window))
        tiles += [part for tile in found for part in _cut(tile, side)] if side else found
    return Tiles(tiles, None if window is None else positions, window)


def whole_row(tokens: int) -> list[Span]:
    return [Span(0, tokens, 0)]


def places_of(spans: Sequence[Span], device: torch.device) -> Tensor:
    """Returns the places in the row of the tokens of a tensor, [tokens]."""
    return torch.cat([torch.arange(span.first, span.stop, device=device) for span in spans])


def _runs(segments: Tensor, ends: Tensor) -> list[Run]:
    """Returns the runs of a row, [T] each."""
    changed = (segments[1:] != segments[:-1]) | (ends[1:] != ends[:-1])
    bounds = [0, *(changed.nonzero()[:, 0] + 1).tolist(), len(segments)]
    ids = zip(segments[bounds[:-1]].tolist(), ends[bounds[:-1]].tolist(), strict=True)
    return [Run(a, b, *own) for a, b, own in zip(bounds, bounds[1:], ids, strict=False)]


def _pairs(runs: Iterable[Run]) -> Iterator[tuple[Run, Run]]:
    """Yields (run of queries, run of keys that it sees)."""
    earlier: dict[int, list[Run]] = {}
    for run in runs:
        if run.segment < 0:
            continue
        same = earlier.setdefault(run.segment, [])
        same.append(run)
        yield from ((run, other) for other in same if run.first < other.end)


def _seen(runs: Iterable[Run], queries: Sequence[Span], keys: Sequence[Span], row: int) -> Iterator[Tile]:
    """Yields the tiles of a row without a window."""
    for run, other in _pairs(runs):
        for query_span in queries:
            for key_span in keys:
                yield from _rectangles(run, other, query_span, key_span, row)


def _rectangles(run: Run, other: Run, query_span: Span, key_span: Span, row: int) -> Iterator[Tile]:
    asking = _part(query_span, run.first, run.stop)
    if asking.first >= asking.stop:
        return
    before = _part(key_span, other.first, min(other.stop, asking.first))
    own = _part(key_span, asking.first, asking.stop)
    if before.first < before.stop:
        yield Tile(row, asking, before)
    if run is other and own.first < own.stop:
        assert own[:2] == asking[:2], "the spans of queries and keys overlap in part"
        yield Tile(row, asking, own, causal=True)


def _part(span: Span, first: int, stop: int) -> Span:
    """Returns what lies in places first to stop; empty if first >= stop."""
    first, stop = max(first, span.first), min(stop, span.stop)
    return Span(first, stop, span.index + first - span.first)


def _near(tile: Tile, positions: Tensor, window: int) -> Iterator[Tile]:
    """Yields the parts of a tile in which a query sees a key less than `window` positions [T] back."""
    (a, b, _), (c, d, _) = tile.queries, tile.keys
    if positions[a:b].max() - positions[c:d].min() < window:
        yield tile
        return
    for start in range(a, b, WINDOW_TOKENS):
        asking = _part(tile.queries, start, start + WINDOW_TOKENS)
        end = asking.stop if tile.causal else d
        least = positions[asking.first : asking.stop].min() - window
        near = (positions[c:end] > least).nonzero()[:, 0]
        if len(near):
            yield Tile(tile.row, asking, _part(tile.keys, c + int(near[0]), c + int(near[-1]) + 1), windowed=True)


def _cut(tile: Tile, side: int) -> Iterator[Tile]:
    """Yields the parts of a tile, of at most `side` queries and keys; those above the diagonal hold nothing."""
    for a in range(tile.queries.first, tile.queries.stop, side):
        asking = _part(tile.queries, a, a + side)
        for c in range(tile.keys.first, tile.keys.stop, side):
            keys = _part(tile.keys, c, c + side)
            if tile.causal and keys.first > asking.first:
                continue
            on_diagonal = tile.causal and keys.first == asking.first
            yield Tile(tile.row, asking, keys, on_diagonal, tile.windowed)
