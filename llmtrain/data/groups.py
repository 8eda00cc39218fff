"""Lays out groups of samples in rows in which the samples of a prompt share its tokens (see `types.Batch`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from llmtrain.data.packing import Row, concatenate, side_by_side, to_batch
from llmtrain.types import IGNORE, Batch, Group, Sample

OWN = ("input_ids", "labels", "positions", "segment_ids", "branch_ids", "old_logprobs")


def group_length(samples: Sequence[Sample]) -> int:
    """Returns the tokens of a group in a row: the prompt without its last token, and what follows it in each sample."""
    return len(samples[0].prompt_ids) - 1 + sum(len(s.ids) for s in samples)


def seen_pairs(samples: Sequence[Sample]) -> int:
    """Returns how many pairs of a token and one that it sees a group has: the work of its attention."""
    trunk = len(samples[0].prompt_ids) - 1
    return trunk * (trunk + 1) // 2 + sum(len(s.ids) * trunk + len(s.ids) * (len(s.ids) + 1) // 2 for s in samples)


def pieces(samples: Group, width_tokens: int, whole: bool) -> Iterator[Group]:
    """Yields the group, cut where it would outgrow a row. Raises ValueError when one sample alone does, or any group
    that must stay `whole`."""
    if whole and group_length(samples) > width_tokens:
        raise ValueError(
            f"a group of {group_length(samples)} tokens does not fit in a row of {width_tokens}, and its loss compares "
            "its samples; widen the rows, or drop the group"
        )
    piece: Group = []
    for sample in samples:
        if group_length([sample]) > width_tokens:
            raise ValueError(
                f"a sample of {group_length([sample])} tokens does not fit in a row of {width_tokens}; widen the rows, "
                "or lower rollout.max_new_tokens"
            )
        if piece and group_length([*piece, sample]) > width_tokens:
            yield piece
            piece = []
        piece.append(sample)
    yield piece


def check_group(samples: Group, columns: Sequence[str]) -> None:
    """Asserts what `lay_out` takes for granted: else what follows in the row would be out of place, silently."""
    assert not set(columns) & {*OWN, "loss_mask"}, f"{columns}: a column of a sample has a name of its own"
    for s in samples:
        assert s.prompt_ids and s.ids, "a sample has a prompt and at least one token after it"
        assert s.prompt_ids == samples[0].prompt_ids, "the samples of a group share their prompt"
        for name in columns:
            assert len(s.columns[name]) == len(s.ids), f"{name}: one value for each of `ids`"


def lay_out(samples: Group, columns: Sequence[str]) -> Row:
    """Returns the columns of one group (or piece of it), which is one segment.

    The trunk is the prompt without its last token; every branch starts with that token. A token that the policy did not
    write is an input, but no label.
    """
    check_group(samples, columns)
    *trunk, last = samples[0].prompt_ids
    n = len(trunk)
    zeros = [0.0] * n
    parts = [(trunk, [IGNORE] * n, list(range(n)), [0] * n, [0] * n, zeros, *[zeros for _ in columns])]
    for branch, s in enumerate(samples, 1):
        m = len(s.ids)
        labels = [token if trained else IGNORE for token, trained in zip(s.ids, s.trained, strict=True)]
        own = ([last, *s.ids[:-1]], labels, list(range(n, n + m)), [0] * m, [branch] * m, s.logprobs)
        parts.append((*own, *[s.columns[name] for name in columns]))
    return concatenate([dict(zip((*OWN, *columns), map(list, part), strict=True)) for part in parts])


def piece_batch(
    parts: Sequence[Group],
    rows: Sequence[Sequence[int]],
    width_tokens: int,
    pad_id: int,
    columns: Sequence[str] = (),
    experts: bool = False,
) -> Batch:
    """Returns groups or `pieces` of groups in rows that `rows` names by their numbers, [len(rows), width_tokens].

    Groups in one row are told apart by their segment. The batch has the columns of `Batch`, and as its extra ones
    `old_logprobs` (when sampled) and the `columns` of the samples that are named; with `experts` those of the samples.
    """
    laid_out = [side_by_side([lay_out(parts[number], columns) for number in row]) for row in rows]
    batch = to_batch([row or empty_row(columns) for row in laid_out], width_tokens, pad_id)
    return replace(batch, experts=expert_rows(parts, rows, width_tokens)) if experts else batch


def expert_rows(parts: Sequence[Group], rows: Sequence[Sequence[int]], width_tokens: int) -> Tensor:
    """Returns `Batch.experts` of groups laid out as `piece_batch` does; -1 in padding. Those of the trunk are the first
    sample's: all samples of a group were started from one computed prompt."""
    found = torch.full((len(rows), width_tokens, parts[0][0].experts.size(1)), -1, dtype=torch.int16)
    for row, numbers in zip(found, rows, strict=True):
        at = 0
        for samples in (parts[number] for number in numbers):
            trunk = len(samples[0].prompt_ids) - 1
            for piece in (samples[0].experts[:trunk], *(s.experts[trunk:] for s in samples)):
                row[at : at + len(piece)] = piece
                at += len(piece)
    return found


def empty_row(columns: Sequence[str]) -> Row:
    """Returns a row without a token."""
    return {name: [] for name in (*OWN, *columns)}
