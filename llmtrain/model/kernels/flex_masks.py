"""Masks of flex attention, made from ids without a T x T mask: the work is that of (T / BLOCK)^2 numbers a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128  # tokens; what the kernels are tuned for

Pair = tuple[Tensor, Tensor]
"""[B, query blocks, key blocks] bool: may hold something that is seen; everything in it is seen."""


def block_mask(
    segment_ids: Tensor | None, branch_ids: Tensor | None, positions: Tensor, window: int | None
) -> BlockMask:
    """The visibility of `model.attention.attention_mask` for whole rows, [B, T] each; no segments = one a row."""
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
    """By the least and the greatest id of each block: no block with something seen is left out, none with something
    hidden is called whole."""
    T = positions.size(1)
    number = torch.arange(-(-T // BLOCK), device=positions.device)
    whole = (number + 1) * BLOCK <= T  # a block that the row does not fill never counts as such
    pairs = [((number[:, None] >= number)[None], ((number[:, None] > number) & whole[:, None])[None])]
    if segment_ids is not None:  # padding last, or the block where it begins would span all segments
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
    """Of blocks that hold ids in common; hold one and the same."""
    low, high = _ranges(ids)
    some = (low[:, None] <= high[:, :, None]) & (low[:, :, None] <= high[:, None])
    return some, (low[:, None] == high[:, :, None]) & (low[:, :, None] == high[:, None])


def _ranges(x: Tensor) -> Pair:
    """[B, T] -> the least and the greatest of each block, [B, blocks]."""
    T = x.size(1)
    places = torch.arange(-(-T // BLOCK) * BLOCK, device=x.device).clamp(max=T - 1)
    return x[:, places].unflatten(1, (-1, BLOCK)).aminmax(dim=-1)


def _ordered(blocks: Tensor) -> Pair:
    """[B, query blocks, key blocks] bool -> how many for each query block, and their numbers first; for all heads."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None]


def _rule(
    segment_ids: Tensor | None, branch_ids: Tensor | None, positions: Tensor, window: int | None
) -> Callable[..., Tensor]:
    """Of one query and one key, for the blocks of which a part is seen."""

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
