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
"""Holds two masks of blocks, bool [B, query blocks, key blocks]: some of the block may be seen; all of it is seen."""


def block_mask(
    segment_ids: Tensor | None, branch_ids: Tensor | None, positions: Tensor, window: int | None
) -> BlockMask:
    """Returns the visibility of `model.attention.attention_mask` for whole rows, as the mask of flex attention.

    The ids are [B, T]; `segment_ids` None = one segment a row.
    """
    from torch.nn.attention.flex_attention import BlockMask

    T = positions.size(1)
    some, every = seen_blocks(segment_ids, branch_ids, positions, window)
    return BlockMask.from_kv_blocks(
        *_ordered(some & ~every),
        *_ordered(every),
        BLOCK_SIZE=BLOCK,
        mask_mod=_rule(segment_ids, branch_ids, positions, window),
        seq_lengths=(T, T),
    )


def seen_blocks(segment_ids: Tensor | None, branch_ids: Tensor | None, positions: Tensor, window: int | None) -> Pair:
    """Returns which blocks may be seen at all and which as a whole, judged by the least and greatest id of each block.

    The judgement is safe: no block with something seen is left out, none with something hidden is called whole.
    """
    T = positions.size(1)
    number = torch.arange(-(-T // BLOCK), device=positions.device)
    whole = (number + 1) * BLOCK <= T  # False for a block that the row does not fill
    pairs = [((number[:, None] >= number)[None], ((number[:, None] > number) & whole[:, None])[None])]
    if segment_ids is not None:  # padding sorts last, or the block where it begins would span all segments
        pairs.append(_equal(segment_ids.where(segment_ids >= 0, torch.iinfo(segment_ids.dtype).max)))
    if branch_ids is not None:
        low, high = _ranges(branch_ids)
        some, every = _equal(branch_ids)
        pairs.append((some | (low == 0)[:, None], every | (high == 0)[:, None]))
    if window is not None:
        low, high = _ranges(positions)
        pairs.append((low[:, :, None] - high[:, None] < window, high[:, :, None] - low[:, None] < window))
    some, every = pairs[0]
    for more, most in pairs[1:]:
        some, every = some & more, every & most
    return some, every


def _equal(ids: Tensor) -> Pair:
    """Returns which pairs of blocks may hold ids in common, and which hold one and the same id only."""
    low, high = _ranges(ids)
    some = (low[:, None] <= high[:, :, None]) & (low[:, :, None] <= high[:, None])
    return some, (low[:, None] == high[:, :, None]) & (low[:, :, None] == high[:, None])


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
    segment_ids: Tensor | None, branch_ids: Tensor | None, positions: Tensor, window: int | None
) -> Callable[..., Tensor]:
    """Returns the rule of visibility of one query and one key, for the blocks that are seen in part."""

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        mask = query >= key
        if segment_ids is not None:
            mask = mask & (segment_ids[batch, query] == segment_ids[batch, key])
        if branch_ids is not None:
            branch = branch_ids[batch, key]
            mask = mask & ((branch == 0) | (branch_ids[batch, query] == branch))
        if window is not None:
            mask = mask & (positions[batch, query] - positions[batch, key] < window)
        return mask

    return seen
