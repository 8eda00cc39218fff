"""Sums and means over whole sequences, for losses of pairs and for ratios of sequences."""

from __future__ import annotations

import torch
from torch import Tensor

from llmtrain.types import Batch


def sequence_sums(x: Tensor, mask: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Returns ([sequences]: the sum of `x` over the positions of each where `mask` is True; [B, T] int64: the number
    of the sequence that a position belongs to, -1 = none).

    x and mask (bool) are [B, T]. A sequence is one branch of a group, or a segment without branches; padding, and a
    trunk that branches share, belong to none. They are numbered row by row, within a row by segment and then by branch,
    so that the two of a pair (branches of one group, or rows of one document each) are neighbours: `sums.view(-1, 2)`,
    where no group was cut over rows (`data.groups`: `whole=True`).
    A sequence without a position in the mask has the sum 0. What is masked adds nothing to value or gradient, even if
    it is infinite or NaN.

    Example: one row of a group of two and a document
        x            [1, 2, 3, 4, 5, 6]  all in the mask       sums     [2 + 3, 4, 5]
        segment_ids  [0, 0, 0, 0, 1, -1]                       numbers  [-1, 0, 0, 1, 2, -1]
        branch_ids   [0, 1, 1, 2, 0, 0]
    """
    places, there = _places(batch)
    members = places[:, None] == torch.arange(there.size(1), device=x.device)[:, None]  # [B, places, T]
    # not scattered: on a GPU the order of the terms, and with it the last bits, would change from call to call
    each = torch.where(members & mask[:, None], x[:, None], 0.0).sum(-1)
    numbers = torch.where(there, there.flatten().cumsum(0).view(there.shape) - 1, -1)
    return each[there], torch.where(places < 0, -1, numbers.gather(1, places.clamp(min=0)))


def sequence_means(x: Tensor, mask: Tensor, batch: Batch) -> Tensor:
    """Returns, [B, T], at each position in the mask the mean of `x` over the positions of its sequence that are in the
    mask; 0 elsewhere. Gradients reach what is in the mask alone.

    Example: x [1, 3, 5] of branches [1, 1, 2] of one group, all in the mask -> [2, 2, 5]
    """
    places, there = _places(batch)
    members = (places[:, None] == torch.arange(there.size(1), device=x.device)[:, None]) & mask[:, None]
    sums, counts = torch.where(members, x[:, None], 0.0).sum(-1), members.sum(-1)
    means = sums / counts.clamp(min=1)
    return torch.where(members, means[..., None], 0.0).sum(1)  # not gathered: its gradient would be scattered


def _places(batch: Batch) -> tuple[Tensor, Tensor]:
    """Returns ([B, T]: segment x branches + branch of each position, -1 = padding; [B, segments x branches] bool: the
    places at which a row has a sequence)."""
    zeros = torch.zeros_like(batch.input_ids)
    segments = zeros if batch.segment_ids is None else batch.segment_ids
    branches = zeros if batch.branch_ids is None else batch.branch_ids
    num_segments, num_branches = (1 + int(ids.max().clamp(min=0)) for ids in (segments, branches))
    places = torch.where(segments < 0, -1, segments * num_branches + branches)
    # one place more, for padding
    seen = zeros.new_zeros(len(zeros), 1 + num_segments * num_branches).scatter_(1, places + 1, 1)[:, 1:]
    there = seen.bool().view(len(zeros), num_segments, num_branches)
    there[..., 0] &= ~there[..., 1:].any(-1)  # a trunk that branches share
    return places, there.flatten(1)
