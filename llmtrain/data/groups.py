"""Rows of GRPO experience in which the samples of a prompt share its tokens (`types.Batch`, second example)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from llmtrain.data.packing import Row, best_fit, concatenate, to_batch
from llmtrain.types import IGNORE, Batch, Experience

COLUMNS = ("input_ids", "labels", "positions", "segment_ids", "branch_ids", "advantages", "old_logprobs")


def group_length(samples: Sequence[Experience]) -> int:
    """Tokens of a group in a row: the prompt but its last token, and each sample's completion."""
    return len(samples[0].rollout.prompt_ids) - 1 + sum(len(s.rollout.completion_ids) for s in samples)


def row_width(groups: Sequence[Sequence[Experience]], multiple: int) -> int:
    """The width in which the longest group fits in one row, rounded up to a multiple; that multiple without groups."""
    return -(-max(map(group_length, groups), default=1) // multiple) * multiple


def pieces(samples: Sequence[Experience], width_tokens: int) -> Iterator[list[Experience]]:
    """The group, cut where it would outgrow a row. Raises ValueError when one sample alone does."""
    piece: list[Experience] = []
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


def lay_out(samples: Sequence[Experience], segment: int) -> Row:
    """One group (or piece): the trunk is the prompt but its last token; every branch starts with that token."""
    *trunk, last = samples[0].rollout.prompt_ids
    n = len(trunk)
    parts = [(trunk, [IGNORE] * n, list(range(n)), [segment] * n, [0] * n, [0.0] * n, [0.0] * n)]
    for branch, sample in enumerate(samples, 1):
        ids = sample.rollout.completion_ids
        m = len(ids)
        positions, advantages = list(range(n, n + m)), [sample.advantage] * m
        parts.append(
            ([last, *ids[:-1]], ids, positions, [segment] * m, [branch] * m, advantages, sample.rollout.logprobs)
        )
    return concatenate([dict(zip(COLUMNS, map(list, part), strict=True)) for part in parts])


def group_rows(groups: Sequence[Sequence[Experience]], width_tokens: int) -> list[Row]:
    """Lay out groups (samples of one prompt each) in as few rows of at most `width_tokens` as best fit finds.

    Longest first; groups in one row are told apart by their segment; a group longer than a row is cut into several,
    the prompt repeated. Raises ValueError when a sample alone is longer. Columns: as in `Batch`, and the extra
    `advantages` and `old_logprobs` (those of the rollout).
    """
    parts = [piece for group in groups for piece in pieces(group, width_tokens)]
    parts.sort(key=group_length, reverse=True)
    plan = best_fit([group_length(part) for part in parts], width_tokens)
    return [concatenate([lay_out(parts[i], k) for k, i in enumerate(row)]) for row in plan]


def group_batch(groups: Sequence[Sequence[Experience]], width_tokens: int, rows: int, pad_id: int) -> Batch:
    """The groups in exactly `rows` rows, [rows, width_tokens], the last ones empty if fewer are needed.

    `len(group_rows(groups, width_tokens))` says how many are. Raises ValueError when `rows` is less.
    """
    filled = group_rows(groups, width_tokens)
    if len(filled) > rows:
        raise ValueError(f"the groups need {len(filled)} rows of {width_tokens} tokens, but only {rows} were asked for")
    empty: Row = {name: [] for name in COLUMNS}
    return to_batch(filled + [empty] * (rows - len(filled)), width_tokens, pad_id)
