"""Plans how rows of tokens are computed so that what they share is computed once. Pure.

Rows that begin alike form a tree. A small tree lies in one row of the batch, its tokens in depth-first order: a token
sees those on its way to the root (tree attention, as of the `ends` of `types.Batch`). What the rows
of a large tree have in common is a stem, whose keys and values are kept while they are computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from llmtrain.data.tree import shared_tokens
from llmtrain.rollout.stem import STEM_TOKENS

ROW_TOKENS = 512  # of a tree in one row: attention computes all its scores, seen or not
GAIN = 1 / 8  # a tree lies in one row if that saves so many tokens for each that it has
ENOUGH_TOKENS = 512  # in a forward: with more a CPU is no faster
FULL = 0.85  # a row that is shorter than this share of the longest one waits for the next forward

Ids = tuple[int, ...]


@dataclass
class Packed:
    """Holds neighbouring leaves in one row, whose tokens behind the stem are in depth-first order.

    Example: the leaves (5, 6, 7) and (5, 8) behind no stem:
        ids = [5, 6, 7, 8]   positions = [0, 1, 2, 1]   ends = [4, 3, 3, 4]   paths = [[0, 1, 2], [0, 3]]
    """

    leaves: range
    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)  # the tokens from a place up to this one see it
    paths: list[list[int]] = field(default_factory=list)  # of each leaf: the places of its tokens, from the stem on


@dataclass
class Node:
    """Holds what is computed behind the first `tokens` tokens of a leaf."""

    tokens: int
    leaf: int
    rows: list[Packed] = field(default_factory=list)
    stems: list[Node] = field(default_factory=list)  # longer ones


def merged(rows: Sequence[Ids]) -> tuple[list[Ids], list[int]]:
    """Returns the rows that begin no other one, each once and sorted, and for each row the number of such a leaf that
    begins with it. Example: merged([(5,), (5, 6)]) -> [(5, 6)], [0, 0]
    """
    leaves: list[Ids] = []
    owners = [0] * len(rows)
    for i in sorted(range(len(rows)), key=rows.__getitem__, reverse=True):
        if not leaves or leaves[-1][: len(rows[i])] != rows[i]:
            leaves.append(rows[i])
        owners[i] = len(leaves)
    return leaves[::-1], [len(leaves) - owner for owner in owners]


def plan(leaves: Sequence[Ids], asked: Sequence[int]) -> Node:
    """Returns what to compute, given what `merged` gives and, for each leaf, the first position whose hidden state is
    asked for: it lies in no stem."""
    shared = [0, *(shared_tokens(a, b) for a, b in pairwise(leaves))]  # of each leaf, with the one before
    root = Node(0, 0)
    waiting = [(root, range(len(leaves)))]
    while waiting:
        node, chosen = waiting.pop()
        inner = shared[chosen.start + 1 : chosen.stop]
        common = min(inner, default=len(leaves[chosen.start]))
        if not inner or _pays(leaves, shared, node.tokens, chosen, common):
            node.rows.append(packed(leaves, shared, node.tokens, chosen))
            continue
        kept = min(common, *asked[chosen.start : chosen.stop])
        if kept - node.tokens >= STEM_TOKENS:
            node.stems.append(Node(kept, chosen.start))
            node = node.stems[-1]
        cuts = [chosen.start, *(k for k in chosen[1:] if shared[k] == common), chosen.stop]
        waiting += [(node, range(*cut)) for cut in pairwise(cuts)]
    return root


def _pays(leaves: Sequence[Ids], shared: Sequence[int], stem: int, chosen: range, common: int) -> bool:
    """Says whether these leaves belong in one row."""
    tokens = len(leaves[chosen.start]) - stem + sum(len(leaves[k]) - shared[k] for k in chosen[1:])
    saved = (common - stem) * sum(shared[k] == common for k in chosen[1:])
    return tokens <= ROW_TOKENS and saved >= GAIN * tokens


def packed(leaves: Sequence[Ids], shared: Sequence[int], stem: int, chosen: range) -> Packed:
    """Returns the row of the `chosen` leaves behind a stem of so many tokens."""
    row, path = Packed(chosen), []
    for k in chosen:
        kept = 0 if k == chosen.start else shared[k] - stem
        for place in path[kept:]:
            row.ends[place] = len(row.ids)
        new = leaves[k][stem + kept :]
        path = [*path[:kept], *range(len(row.ids), len(row.ids) + len(new))]
        row.ids += new
        row.positions += range(stem + kept, len(leaves[k]))
        row.ends += [0] * len(new)
        row.paths.append(path)
    for place in path:
        row.ends[place] = len(row.ids)
    return row


def batches(rows: Sequence[Packed], batch_tokens: int) -> Iterator[list[Packed]]:
    """Yields rows that share a forward: longest first, `batch_tokens` tokens at most, padding counted, unless one row
    has more. Trees, which need a mask, and plain rows are apart; and unlike lengths, where a forward is large enough
    without."""
    batch: list[Packed] = []
    for row in sorted(rows, key=lambda row: (len(row.leaves) > 1, -len(row.ids))):
        width, kind = (len(batch[0].ids), len(batch[0].leaves) > 1) if batch else (0, None)
        full = (len(batch) + 1) * width > batch_tokens or (len(row.leaves) > 1) != kind
        if batch and (full or (len(batch) * width >= ENOUGH_TOKENS and len(row.ids) < FULL * width)):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
