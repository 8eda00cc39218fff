"""Microbatches of groups on a rank: how many, how wide, which."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llmtrain.arch.resolve import resolve_model
from llmtrain.config.schema import ModelConfig, TrainConfig
from llmtrain.losses.policy import grpo_loss
from llmtrain.model.decoder import Decoder, initialize
from llmtrain.parallel.pipeline import inputs_of
from llmtrain.trainer.batches import group_microbatches
from llmtrain.types import IGNORE, Batch, Sample, Scores

WORKER = Path(__file__).with_name("group_batches_worker.py")
ENGINES = [  # all of 4 ranks: every axis, both engines
    {"dp_shard": 4, "zero_stage": 2, "train": {"micro_batch_tokens": 64}},
    {"pp": 2, "dp_shard": 2, "backend": "fsdp", "train": {"micro_batch_tokens": 96}},
    {"cp": 2, "tp": 2, "zero_stage": 1, "train": {"micro_batch_seqs": 2}},
]
OTHERS = [
    *({"cp": 2, "tp": 2, "context": way, "backend": "fsdp"} for way in ("ring", "allgather", "alltoall")),
    {"cp": 4, "zero_stage": 1},
    {"tp": 4, "zero_stage": 2, "sequence_parallel": False, "model": {"num_kv_heads": 4}},
    {"pp": 2, "tp": 2, "zero_stage": 1, "schedule": "zbv", "virtual_stages": 2},
    {"pp": 2, "cp": 2, "backend": "fsdp", "remat": "selective", "context": "alltoall"},
    {"dp_replicate": 2, "dp_shard": 2, "backend": "fsdp", "remat": "full"},
    {"dp_shard": 4, "zero_stage": 3, "precision": "fp32"},
]
MODEL = resolve_model(ModelConfig(num_layers=2, hidden_size=32, ffn_size=48, num_kv_heads=2, vocab_size=512))


def batches(
    groups: list[list[Sample]],
    fixed_width: bool = False,
    dp: tuple[int, int] = (0, 1),
    whole: bool = False,
    train: TrainConfig | None = None,
    columns: tuple[str, ...] = (),
    **axes: int,
) -> list[Batch]:
    sizes = {"pp": 1, "cp": 1, "tp": 1, **axes}
    mesh = SimpleNamespace(sizes=sizes, dp_rank=dp[0], dp_size=dp[1])
    train = train or TrainConfig(seq_len=2048, micro_batch_seqs=1)
    config = SimpleNamespace(train=train, rollout=SimpleNamespace(temperature=0.7))
    job = SimpleNamespace(config=config, mesh=mesh, tokenizer=SimpleNamespace(pad_id=0), model=MODEL)
    return group_microbatches(job, groups, columns, fixed_width, whole)


def group(tokens: int, first: int = 1, samples: int = 1) -> list[Sample]:
    ids = list(range(first, first + tokens))
    columns = {"advantages": [0.5] * tokens}
    return [
        Sample([9], ids, [True] * tokens, [-6.0] * tokens, [0] * tokens, finished=True, columns=columns)
        for _ in range(samples)
    ]


def shapes(found: list[Batch]) -> list[tuple[int, ...]]:
    return [tuple(batch.input_ids.shape) for batch in found]


@pytest.mark.parametrize(
    ("axes", "shape"),
    [({}, (2, 32)), ({"cp": 2}, (2, 32)), ({"cp": 4, "tp": 4}, (2, 32)), ({"cp": 4, "tp": 3}, (2, 48))],
)
def test_rows_are_no_wider_than_needed_and_divide_by_cp_and_tp(axes: dict, shape: tuple[int, int]) -> None:
    """In two chunks a context-parallel rank, each divided by tp."""
    assert shapes(batches([group(20), group(30)], **axes)) == [shape]


def test_a_microbatch_has_at_most_the_tokens_of_its_rows_or_those_of_the_key() -> None:
    groups = [group(30) for _ in range(12)]
    assert shapes(batches(groups)) == [(12, 32)]
    short = {"seq_len": 64, "micro_batch_seqs": 3}
    assert shapes(batches(groups, train=TrainConfig(**short))) == [(6, 32)] * 2  # 192 tokens
    assert shapes(batches(groups, train=TrainConfig(**short, micro_batch_tokens=96))) == [(3, 32)] * 4


def test_rows_have_the_shape_of_text_where_a_pipeline_has_both() -> None:
    train = TrainConfig(seq_len=64, micro_batch_seqs=2)
    assert shapes(batches([group(20)], fixed_width=True, train=train)) == [(1, 32)]
    assert shapes(batches([group(20)], fixed_width=True, train=train, pp=2)) == [(2, 64)] * 2


def test_every_pipeline_stage_has_a_microbatch() -> None:
    found = batches([group(5)], pp=3)
    assert [int(batch.loss_mask.sum()) for batch in found] == [5, 0, 0] and len(set(shapes(found))) == 1


def test_ranks_share_the_rows() -> None:
    groups = [group(10, first) for first in (100, 200, 300)]
    parts = [batches(groups, dp=(rank, 2)) for rank in range(2)]
    assert shapes(parts[0]) == shapes(parts[1])
    labels = [x for part in parts for batch in part for x in batch.labels.flatten().tolist() if x != IGNORE]
    assert sorted(labels) == sorted(x for each in groups for x in each[0].ids)
    assert {batch.temperature for part in parts for batch in part} == {0.7}


def test_a_group_is_cut_at_a_row_unless_it_must_stay_whole() -> None:
    train = TrainConfig(seq_len=64, micro_batch_seqs=2)
    (batch,) = batches([group(40, samples=2)], train=train)
    assert [int(row.max()) for row in batch.branch_ids] == [1, 1]
    with pytest.raises(ValueError, match="a group of 80 tokens does not fit in a row of 64"):
        batches([group(40, samples=2)], train=train, whole=True)
    (batch,) = batches([group(30, samples=2)] * 2, train=train, whole=True)
    assert [int(row.max()) for row in batch.branch_ids] == [2, 2]


def gradient(found: list[Batch]) -> torch.Tensor:
    """That of a real loss of all microbatches."""
    model = Decoder(MODEL)
    initialize(model, MODEL, seed=0)
    for batch in found:
        scores = Scores(*model(batch.input_ids, **inputs_of(batch, True)))
        grpo_loss(scores, batch, 0.2, 0.2, 0.0)[0].backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_the_gradient_does_not_depend_on_the_layout() -> None:
    groups = [group(n, first=3 * n, samples=3) for n in (5, 17, 23, 40, 11)]
    settings = [TrainConfig(seq_len=256, micro_batch_seqs=1), TrainConfig(seq_len=256, micro_batch_tokens=1024)]
    settings += [TrainConfig(seq_len=64, micro_batch_tokens=64)]
    found = [batches(groups, train=train, columns=("advantages",)) for train in settings]
    halves = [b for rank in range(2) for b in batches(groups, dp=(rank, 2), columns=("advantages",))]
    assert len({tuple(shapes(each)) for each in [*found, halves]}) == 3
    whole, *others = map(gradient, [*found, halves])
    assert whole.norm() > 1 and all((each - whole).norm() <= 1e-5 * whole.norm() for each in others)


@pytest.mark.parametrize("engines", [ENGINES, pytest.param(OTHERS, marks=pytest.mark.slow)])
def test_every_gradient_on_any_engine_is_that_of_a_row_for_each_sample(forked: Callable, engines: list[dict]) -> None:
    """What samples share is computed once: their prompt, and turns of the policy and of a tool."""
    layouts = [{"train": {"micro_batch_tokens": 96}, **layout} for layout in engines]
    result = forked(4, WORKER, json.dumps(layouts), timeout_s=120)
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"layout"')]
    assert len(lines) == len(engines), result.stdout[-3000:]
    for line in lines:
        assert len({str(seen["shapes"]) for seen in line["ranks"]}) == 1, line
        assert max(seen[name] for seen in line["ranks"] for name in ("loss", "norm", "grad")) <= 1e-5, line
