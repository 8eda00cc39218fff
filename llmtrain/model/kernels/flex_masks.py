"""Makes the block masks of flex attention (arXiv 2412.05496) from ids, in (T / BLOCK)^2 work and no T x T mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128  # tokens; the size that the kernels are tuned for

Pair = tuple[Tensor, Tensor]
"""Holds two tensors of blocks. As masks, bool [B, query blocks, key blocks]: some of it may be seen; all of it is."""


def block_mask(
    segment_ids: Tensor | None,
    ends: Tensor | None,
    positions: Tensor,
    window: int | None,
    queries: Tensor | None = None,
) -> BlockMask:
    """Returns the visibility of `model.attention.attention_mask` as the mask of flex attention.

    Ids and ends are [B, T]; `segment_ids` None = one segment a row. `queries` [Q]: ascending places in it, None = all.
    """
    from torch.nn.attention.flex_attention import BlockMask

    T = positions.size(1)
    some, every = seen_blocks(segment_ids, ends, positions, window, queries)
    rule = _rule(segment_ids, ends, positions, window)
    return BlockMask.from_kv_blocks(
        *_ordered(some & ~every),
        *_ordered(every),
        BLOCK_SIZE=BLOCK,
        mask_mod=rule if queries is None else _at(queries, rule),
        seq_lengths=(T if queries is None else len(queries), T),
    )


def seen_blocks(
    segment_ids: Tensor | None,
    ends: Tensor | None,
    positions: Tensor,
    window: int | None,
    queries: Tensor | None = None,
) -> Pair:
    """Returns which blocks may be seen at all and which as a whole, judged by the least and greatest of each block.

    The judgement is safe: no block with something seen is left out, none with something hidden is called whole.
    """
    T, device = positions.size(1), positions.device
    places, of_key = _both_ranges(torch.arange(T, device=device)[None], queries)
    filled = _filled(T if queries is None else len(queries), device)[:, None] & _filled(T, device)
    pairs = [(places[1] >= of_key[0], (places[0] >= of_key[1]) & filled)]
    if segment_ids is not None:  # padding sorts last, or the block where it begins would span all segments
        ids = segment_ids.where(segment_ids >= 0, torch.iinfo(segment_ids.dtype).max)
        pairs.append(_equal(*_both_ranges(ids, queries)))
    if ends is not None:
        _, of_key = _both_ranges(ends, queries)
        pairs.append((places[0] < of_key[1], places[1] < of_key[0]))
    if window is not None:
        of_query, of_key = _both_ranges(positions, queries)
        pairs.append((of_query[0] - of_key[1] < window, of_query[1] - of_key[0] < window))
    some, every = pairs[0]
    for more, most in pairs[1:]:
        some, every = some & more, every & most
    return some, every


def _both_ranges(ids: Tensor, queries: Tensor | None) -> tuple[Pair, Pair]:
    """Returns the least and the greatest ids of the blocks of queries, [B, query blocks, 1] each, and of keys, [B, 1,
    key blocks]."""
    of_key = _ranges(ids)
    of_query = of_key if queries is None else _ranges(ids[:, queries])
    return (of_query[0][:, :, None], of_query[1][:, :, None]), (of_key[0][:, None], of_key[1][:, None])


def _filled(tokens: int, device: torch.device) -> Tensor:
    """Returns which blocks have BLOCK tokens, [blocks]."""
    return (torch.arange(-(-tokens // BLOCK), device=device) + 1) * BLOCK <= tokens


def _equal(of_query: Pair, of_key: Pair) -> Pair:
    """Returns which pairs of blocks may hold ids in common, and which hold one and the same id only."""
    (low, high), (key_low, key_high) = of_query, of_key
    return (key_low <= high) & (low <= key_high), (key_low == high) & (low == key_high)


def _ranges(x: Tensor) -> Pair:
    """Returns the least and the greatest value of each block of x [B, T], [B, blocks] each."""
    T = x.size(1)
    places = torch.arange(-(-T // BLOCK) * BLOCK, device=x.device).clamp(max=T - 1)
    return x[:, places].unflatten(1, (-1, BLOCK)).aminmax(dim=-1)


def _ordered(blocks: Tensor) -> Pair:
    """Returns, for `blocks` bool [B, query blocks, key blocks], how many key blocks each query block has, [B, 1, query
    blocks], and the key blocks' numbers with those first, [B, 1, query blocks, key blocks]; 1 = for all heads."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None]


def _rule(
    segment_ids: Tensor | None, ends: Tensor | None, positions: Tensor, window: int | None
) -> Callable[..., Tensor]:
    """Returns the rule of visibility of one query and one key, for the blocks that are seen in part."""

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        mask = query >= key
        if segment_ids is not None:
            mask = mask & (segment_ids[batch, query] == segment_ids[batch, key])
        if ends is not None:
            mask = mask & (query < ends[batch, key])
        if window is not None:
            mask = mask & (positions[batch, query] - positions[batch, key] < window)
        return mask

    return seen


def _at(queries: Tensor, rule: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Returns the rule of a query that is counted among `queries`."""

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return rule(batch, head, queries[query], key)

    return seen
