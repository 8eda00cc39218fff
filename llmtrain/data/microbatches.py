"""Plans how pieces of unequal length share the rows and microbatches of a step: pure arithmetic, the same on all ranks.

All microbatches of a step have one shape, which pipelines and ranks that work in step want. Pieces lie one behind the
other in rows, each a segment of its own. Of all shapes that fit the limits the cheapest is taken; its width is about
the narrowest into which best fit, longest piece first, still packs everything (MULTIFIT: Coffman, Garey and Johnson,
SIAM J. Comput. 7, 1978).

Why several rows, and not one long row a microbatch: rows shorter than 1,024 tokens are masked, and every score of them
is computed. 1,204 tokens of groups of 75 took, forward and backward on a CPU (4 layers, 128 / 576 wide): 0.18 / 1.74 s
in rows of 208, 0.32 / 2.13 s in rows of 816. From 1,024 tokens on kernels leave out what is not seen, and a row of
1,024 costs what one of 4,096 does; but many short pieces are many small tiles: 0.29 s in one row of 1,408.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

MICROBATCH_TOKENS = 16  # what a microbatch more costs beside its tokens, as so many of them: small operations, on a CPU

Cost = Callable[[int], float]
"""Maps the width of a row to the work of each of its tokens, in any unit."""


@dataclass(frozen=True)
class Limits:
    """Bounds the microbatches of a step."""

    tokens: int  # of a microbatch
    row_tokens: int  # of a row; at most `tokens`
    multiple: int  # rows have a multiple of this, or `row_tokens`
    dp: int  # data-parallel ranks: they have equal numbers of microbatches
    pp: int  # the least microbatches of a rank

    def width(self, tokens: int) -> int:
        """Returns the width of rows that hold so many tokens, of at most `row_tokens`."""
        return min(self.row_tokens, -(-max(1, tokens) // self.multiple) * self.multiple)


class Layout(NamedTuple):
    """Says what lies where. Example: Layout([[[0], [2, 1]]], 32) is one microbatch of two rows of 32 tokens, the second
    with piece 1 behind piece 2."""

    microbatches: list[list[list[int]]]  # of all ranks, equal numbers of rows; rank r has r, r + dp, r + 2 dp, ...
    width: int


class _Shape(NamedTuple):
    cost: float
    microbatches: int
    rows: int  # of a microbatch
    width: int


def plan_microbatches(lengths: Sequence[int], loads: Sequence[float], limits: Limits, cost: Cost) -> Layout:
    """Returns the cheapest layout of pieces with these lengths, each at most `row_tokens`.

    `loads`: the work in attention of each piece, any unit, by which rows are dealt to microbatches evenly.
    """
    cost, longest = cache(cost), limits.width(max(lengths, default=1))
    best, plan = None, None
    for bound in sorted(_shapes(lengths, longest, limits, cost)):
        if best is not None and bound.cost >= best.cost:
            break
        count = bound.microbatches * bound.rows
        for width in _widths(bound.width, limits, bound.rows):
            shape = bound._replace(width=width, cost=_cost(bound.microbatches, bound.rows, width, longest, cost))
            if best is not None and shape >= best:
                break
            if (found := best_fit_within(lengths, count, width)) is not None:
                best, plan = shape, found
                break
    assert best is not None and plan is not None, "a piece is longer than a row"
    return Layout(_deal(plan, loads, best.microbatches), best.width)


def plan_fixed(lengths: Sequence[int], loads: Sequence[float], limits: Limits, rows: int) -> Layout:
    """Returns a layout in microbatches of `rows` rows of `row_tokens` tokens, as few as best fit finds."""
    count = limits.dp * limits.pp
    while (plan := best_fit_within(lengths, count * rows, limits.row_tokens)) is None:
        count += limits.dp
    return Layout(_deal(plan, loads, count), limits.row_tokens)


def _shapes(lengths: Sequence[int], longest: int, limits: Limits, cost: Cost) -> Iterator[_Shape]:
    """Yields the shapes that could hold everything, with the least width and cost that each could have."""
    least, most = limits.dp * limits.pp, -(-len(lengths) // limits.dp) * limits.dp
    for microbatches in range(least, max(least, most) + 1, limits.dp):
        for rows in range(1, min(limits.tokens // longest, max(1, -(-len(lengths) // microbatches))) + 1):
            mean = -(-sum(lengths) // (microbatches * rows))
            width = max(longest, limits.width(mean))
            if mean <= width and rows * width <= limits.tokens:
                yield _Shape(_cost(microbatches, rows, width, longest, cost), microbatches, rows, width)


def _cost(microbatches: int, rows: int, width: int, longest: int, cost: Cost) -> float:
    return microbatches * (rows * width * cost(width) + MICROBATCH_TOKENS * cost(longest))


def _widths(first: int, limits: Limits, rows: int) -> Iterator[int]:
    """Yields the widths to try, from `first` on in growing steps."""
    most, step = min(limits.row_tokens, limits.tokens // rows), 0
    while (width := limits.width(first + step)) <= most:
        yield width
        if width == limits.row_tokens:
            return
        step = max(limits.multiple, 2 * step)


def best_fit_within(lengths: Sequence[int], rows: int, width: int) -> list[list[int]] | None:
    """Puts pieces, longest first, each into the fullest of the rows that has room. Returns the pieces of each row, None
    if some do not fit."""
    free = [(width, row) for row in range(rows)]
    plan: list[list[int]] = [[] for _ in range(rows)]
    for piece in sorted(range(len(lengths)), key=lambda piece: -lengths[piece]):
        place = bisect_left(free, (lengths[piece],))
        if place == rows:
            return None
        left, row = free.pop(place)
        insort(free, (left - lengths[piece], row))
        plan[row].append(piece)
    return plan


def _deal(plan: Sequence[list[int]], loads: Sequence[float], microbatches: int) -> list[list[list[int]]]:
    """Deals rows to microbatches, equally many to each, the heaviest row first and to the lightest microbatch. Heavy
    microbatches come first: those that the ranks compute at the same time weigh about the same."""
    size, weights = len(plan) // microbatches, [sum(loads[piece] for piece in row) for row in plan]
    open_, done = [(0.0, number, list[list[int]]()) for number in range(microbatches)], []
    for row in sorted(range(len(plan)), key=lambda row: -weights[row]):
        weight, number, rows = heapq.heappop(open_)
        entry = (weight + weights[row], number, [*rows, plan[row]])
        if len(rows) + 1 < size:
            heapq.heappush(open_, entry)
        else:
            done.append(entry)
    return [rows for _, _, rows in sorted(done, key=lambda entry: (-entry[0], entry[1]))]
