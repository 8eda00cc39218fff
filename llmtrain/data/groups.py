"""Lays out groups of samples in rows in which the samples of a prompt share tokens (see `types.Batch`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from llmtrain.data.packing import Row, concatenate, side_by_side, to_batch
from llmtrain.data.tree import Stretch, Tree
from llmtrain.types import IGNORE, Batch, Group, Sample

OWN = ("input_ids", "labels", "positions", "segment_ids", "branch_ids", "old_logprobs", "ends")


def group_length(samples: Sequence[Sample]) -> int:
    """Returns the most tokens that a group has in a row: the prompt without its last token, and what follows it in each
    sample. What the samples share beyond comes off that: see `data.tree`."""
    return len(samples[0].prompt_ids) - 1 + sum(len(s.ids) for s in samples)


def pieces(samples: Group, width_tokens: int, whole: bool) -> Iterator[Tree]:
    """Yields the tree of the group, or those of its parts where it would outgrow a row. Raises ValueError when one
    sample alone does, or any group that must stay `whole`; that shares its prompt alone: it is a pair of answers."""
    if whole and (tokens := group_length(samples)) > width_tokens:
        raise ValueError(
            f"a group of {tokens} tokens does not fit in a row of {width_tokens}, and its loss compares its samples; "
            "widen the rows, or drop the group"
        )
    piece = Tree(turns=not whole)
    for sample in samples:
        if (tokens := group_length([sample])) > width_tokens:
            raise ValueError(
                f"a sample of {tokens} tokens does not fit in a row of {width_tokens}; widen the rows, "
                "or lower rollout.max_new_tokens"
            )
        fit = piece.fit(sample)
        if piece.tokens + fit.tokens > width_tokens:
            yield piece
            piece, fit = Tree(turns=not whole), None
        piece.add(sample, fit)
    yield piece


def check_columns(samples: Sequence[Sample], columns: Sequence[str]) -> None:
    """Asserts what `lay_out` takes for granted: else what follows in the row would be out of place, silently."""
    assert not set(columns) & {*OWN, "loss_mask"}, f"{columns}: a column of a sample has a name of its own"
    for name in columns:
        assert all(len(s.columns[name]) == len(s.ids) for s in samples), f"{name}: one value for each of `ids`"


def lay_out(tree: Tree, columns: Sequence[str]) -> Row:
    """Returns the columns of one group (or piece of it), which is one segment.

    What its samples share stands there once (see `data.tree`): where the policy wrote all of `ids`, the prompt without
    its last token, with which every branch starts. A token that the policy did not write is an input, but no label.
    """
    check_columns(tree.samples, columns)
    stretches, ends = tree.laid_out()
    row = concatenate([stretch_row(tree, stretch, columns) for stretch in stretches])
    return row | {"ends": ends}


def stretch_row(tree: Tree, stretch: Stretch, columns: Sequence[str]) -> Row:
    """Returns the columns of neighbours in the row, but for `ends`. In the trunk nothing is a label, all else is 0."""
    number, branch, start, stop = stretch
    sample, n, prompt = tree.samples[number], stop - start, tree.trunk + 1
    part, later = (slice(max(0, start - k), max(0, stop - k)) for k in (tree.trunk, prompt))
    trunk = n - (part.stop - part.start)
    labels = [
        token if trained else IGNORE for token, trained in zip(sample.ids[part], sample.trained[part], strict=True)
    ]
    found = {
        "input_ids": sample.prompt_ids[start:stop] + sample.ids[later],
        "labels": [IGNORE] * trunk + labels,
        "positions": list(range(start, stop)),
        "segment_ids": [0] * n,
        "branch_ids": [branch] * n,
    }
    values = {"old_logprobs": sample.logprobs} | {name: sample.columns[name] for name in columns}
    return found | {name: [0.0] * trunk + column[part] for name, column in values.items()}


def piece_batch(
    parts: Sequence[Tree],
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


def expert_rows(parts: Sequence[Tree], rows: Sequence[Sequence[int]], width_tokens: int) -> Tensor:
    """Returns `Batch.experts` of groups laid out as `piece_batch` does; -1 in padding. Those of shared tokens are one
    sample's, of the trunk the first's: all samples of a group were started from one computed prompt."""
    layers = parts[0].samples[0].experts.size(1)
    found = torch.full((len(rows), width_tokens, layers), -1, dtype=torch.int16)
    for row, numbers in zip(found, rows, strict=True):
        at = 0
        for tree in (parts[number] for number in numbers):
            for number, _, start, stop in tree.laid_out()[0]:
                row[at : at + stop - start] = tree.samples[number].experts[start:stop]
                at += stop - start
    return found


def empty_row(columns: Sequence[str]) -> Row:
    """Returns a row without a token."""
    return {name: [] for name in (*OWN, *columns)}
