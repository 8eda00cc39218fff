"""Lays out groups of samples in as few rows as there must be, for tests that need a batch and no job."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmtrain.data.groups import empty_row, lay_out, pieces
from llmtrain.data.packing import Row, best_fit, side_by_side, to_batch
from llmtrain.types import Batch, Group


def ends_of(segments: Tensor | None, branches: Tensor | None) -> Tensor | None:
    """Returns `Batch.ends` of rows [B, T] of trunks with one level of branches, given the numbers of both."""
    if branches is None:
        return None
    places = torch.arange(branches.size(1))
    segments = torch.zeros_like(branches) if segments is None else segments
    alike = segments[:, :, None] == segments[:, None]
    mine = alike & ((branches[:, :, None] == 0) | (branches[:, :, None] == branches[:, None]))
    ends = torch.where(mine, places + 1, 0).amax(-1)
    return torch.where(segments < 0, branches.size(1), ends)


def group_rows(
    groups: Sequence[Group], width_tokens: int, columns: Sequence[str] = (), whole: bool = False
) -> list[Row]:
    """Lays out groups in as few rows of at most `width_tokens` as best fit finds.

    Longest first; groups in one row are told apart by their segment; a group longer than a row is cut into several,
    the prompt repeated (with `whole`, for losses of pairs: refused). Raises ValueError when a sample alone is longer.
    """
    parts = [piece for group in groups for piece in pieces(group, width_tokens, whole)]
    parts.sort(key=lambda part: part.tokens, reverse=True)
    plan = best_fit([part.tokens for part in parts], width_tokens)
    return [side_by_side([lay_out(parts[i], columns) for i in row]) for row in plan]


def group_batch(
    groups: Sequence[Group],
    width_tokens: int,
    rows: int,
    pad_id: int,
    columns: Sequence[str] = (),
    whole: bool = False,
) -> Batch:
    """Returns the groups in exactly `rows` rows, [rows, width_tokens], the last ones empty if fewer are needed."""
    filled = group_rows(groups, width_tokens, columns, whole)
    assert len(filled) <= rows
    return to_batch(filled + [empty_row(columns)] * (rows - len(filled)), width_tokens, pad_id)
