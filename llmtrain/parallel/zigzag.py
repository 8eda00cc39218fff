"""Defines which tokens of a row a context-parallel rank has.

A row of T tokens is split into 2 cp chunks; rank i has the chunks i and 2 cp - 1 - i. In a causal row early tokens
attend to few tokens and late ones to many, so this pairing gives every rank the same work (as in the training of Llama
3, arXiv 2407.21783, 3.3.2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmtrain.model.kernels.tile_plan import Span


def to_shards(x: Tensor, dim: int, cp: int) -> Tensor:
    """Reorders a row along `dim` so that the ranks' parts follow each other.

    Example, cp=2: [0 1 2 3 4 5 6 7] -> [0 1 6 7 2 3 4 5]
    """
    early, late = x.unflatten(dim, (2, cp, -1)).unbind(dim)
    return torch.stack([early, late.flip(dim)], dim + 1).flatten(dim, dim + 2)


def from_shards(x: Tensor, dim: int, cp: int) -> Tensor:
    """Restores the order of the row, the inverse of `to_shards`."""
    early, late = x.unflatten(dim, (cp, 2, -1)).unbind(dim + 1)
    return torch.cat([early, late.flip(dim)], dim).flatten(dim, dim + 1)


def shard(x: Tensor, dim: int, rank: int, cp: int) -> Tensor:
    """Returns the part of a whole row that `rank` has."""
    return to_shards(x, dim, cp).chunk(cp, dim)[rank].contiguous()


def places(rank: int, cp: int, shard_tokens: int, device: torch.device) -> Tensor:
    """Returns the positions in the row of the tokens of `rank`, [shard_tokens]."""
    return shard(torch.arange(cp * shard_tokens, device=device), 0, rank, cp)


def spans(rank: int, cp: int, shard_tokens: int) -> list[Span]:
    """Returns the two chunks of `rank`, as they lie in its tensors."""
    n = shard_tokens // 2
    chunks = enumerate((rank, 2 * cp - 1 - rank))
    return [Span(chunk * n, (chunk + 1) * n, number * n) for number, chunk in chunks]
