"""Rows of groups on a rank: how many, how wide, which."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from llmtrain.trainer.batches import group_microbatches
from llmtrain.types import IGNORE, Batch, Sample


def batches(
    groups: list[list[Sample]], fixed_width: bool = False, dp: tuple[int, int] = (0, 1), **axes: int
) -> list[Batch]:
    sizes = {"pp": 1, "cp": 1, "tp": 1, **axes}
    mesh = SimpleNamespace(sizes=sizes, dp_rank=dp[0], dp_size=dp[1])
    config = SimpleNamespace(
        train=SimpleNamespace(seq_len=2048, micro_batch_seqs=1), rollout=SimpleNamespace(temperature=0.7)
    )
    job = SimpleNamespace(config=config, mesh=mesh, tokenizer=SimpleNamespace(pad_id=0))
    return group_microbatches(job, groups, (), fixed_width)


def group(tokens: int, first: int = 1) -> list[Sample]:
    ids = list(range(first, first + tokens))
    return [Sample([9], ids, [True] * tokens, [-1.0] * tokens, [0] * tokens, finished=True)]


@pytest.mark.parametrize(("axes", "width"), [({}, 32), ({"cp": 2}, 32), ({"cp": 4, "tp": 4}, 256), ({"tp": 8}, 128)])
def test_rows_are_as_wide_as_the_longest_group_and_divide_by_cp_and_tp(axes: dict, width: int) -> None:
    assert [batch.input_ids.shape for batch in batches([group(20), group(30)], **axes)] == [(1, width)] * (
        2 if width == 32 else 1
    )
    assert batches([group(20)], fixed_width=True, **axes)[0].input_ids.shape == (1, 2048)


def test_every_pipeline_stage_has_a_microbatch() -> None:
    assert [int(batch.loss_mask.sum()) for batch in batches([group(5)], pp=3)] == [5, 0, 0]


def test_ranks_share_the_rows() -> None:
    groups = [group(10, first) for first in (100, 200, 300)]
    parts = [batches(groups, dp=(rank, 2)) for rank in range(2)]
    assert [len(part) for part in parts] == [2, 2] or [len(part) for part in parts] == [1, 1]
    labels = [x for part in parts for batch in part for x in batch.labels.flatten().tolist() if x != IGNORE]
    assert sorted(labels) == sorted(x for each in groups for x in each[0].ids)
    assert {batch.temperature for part in parts for batch in part} == {0.7}
