"""Runs tests/parity/layouts_worker.py on long rows, which tiles compute: a JSON list of layouts, the tokens of a row.

`layout["task"]` is documents or branches; both end in padding. The reference masks all scores of a row.
"""

from __future__ import annotations

import sys

import torch

from llmtrain.losses.token import token_loss
from llmtrain.model.kernels.backends import TILE_TOKENS
from llmtrain.types import IGNORE, Batch
from tests.group_rows import ends_of
from tests.parity import layouts_worker
from tests.parity.layouts_worker import TASKS, Task, main

WIDTH = int(sys.argv[2])
PADDING = WIDTH // 16


def drawn_lengths(step: int, row: int) -> torch.Tensor:
    """Returns the lengths of the runs of a row, an eighth of it on average, some of a few tokens."""
    g = torch.Generator().manual_seed(1000 * step + row)
    drawn = torch.empty(64).exponential_(8 / WIDTH, generator=g).ceil().long()
    ends = drawn.cumsum(0).clamp(max=WIDTH - PADDING)
    return ends.diff(prepend=torch.tensor([0]))


def document_ids(lengths: torch.Tensor) -> torch.Tensor:
    """Returns (segment, branch, position) of each token, [3, tokens]."""
    at = [torch.arange(n) for n in lengths.tolist()]
    segments = torch.arange(len(lengths)).repeat_interleave(lengths)
    return torch.stack([segments, torch.zeros_like(segments), torch.cat(at)])


def branch_ids(lengths: torch.Tensor) -> torch.Tensor:
    """Returns the same of groups: a trunk and the three samples that share it."""
    groups = lengths[lengths > 0].split(4)
    columns = [
        (segment, branch, at + (int(group[0]) if branch else 0))
        for segment, group in enumerate(groups)
        for branch, length in enumerate(group.tolist())
        for at in range(length)
    ]
    return torch.tensor(columns).T


def batch_of(step: int, rows: int, branches: bool) -> Batch:
    g = torch.Generator().manual_seed(step)
    ids, labels = torch.randint(0, 64, (2, rows, WIDTH), generator=g)
    padding = torch.tensor([-1, 0, 0])[:, None].expand(3, PADDING)
    made = [(branch_ids if branches else document_ids)(drawn_lengths(step, row)) for row in range(rows)]
    segments, branch, positions = torch.stack([torch.cat([each, padding], 1) for each in made]).unbind(1)
    trained = (segments >= 0) & (positions > 0)
    labels = torch.where(trained, labels, IGNORE)
    own = (branch, ends_of(segments, branch)) if branches else ()
    return Batch(ids, labels, trained, positions, segments, *own)


TASKS |= {
    name: Task(
        token_loss,
        lambda batch: batch.loss_mask.sum(),
        lambda step, rows, branches=name == "branches": batch_of(step, rows, branches),
        rows=1,
    )
    for name in ("documents", "branches")
}

if __name__ == "__main__":
    assert WIDTH >= TILE_TOKENS
    layouts_worker.STEPS, layouts_worker.ACCUMULATION = 2, 1
    main()
