"""Growing batches and rows: every token once on any number of ranks, and a killed run that goes on bit for bit."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llmtrain.arch.resolve import fields_from_directory, resolve_model
from llmtrain.checkpoint.load import CheckpointReader
from llmtrain.checkpoint.source import weight_source
from llmtrain.config.load import load
from llmtrain.config.ramp import phase_at, total_tokens
from llmtrain.config.recipes.pretrain import RECIPE
from llmtrain.config.schema import BatchRamp, ModelConfig, RopeScaling, SeqRamp, TrainConfig
from llmtrain.data.packing import TextRows
from llmtrain.model.decoder import Decoder, initialize
from llmtrain.recipes.pretrain import phase_batches, set_rope
from llmtrain.trainer.job import Job
from llmtrain.trainer.resume import check_same_run
from tests.forked import run_alone
from tests.recipes.pretrain_test import FAULTS, assert_same_weights, losses, metrics

RAMPS = (
    "train.batch_ramp=[{from_tokens: 500, global_batch_seqs: 16}]",
    "train.seq_ramp=[{from_tokens: 3000, seq_len: 128, rope_theta: 50000}, {from_tokens: 8000, seq_len: 256}]",
    "train.steps=9",
    "checkpoint.every_steps=1",
    "data.mask_documents=false",
    "train.eval_every_steps=3",
)
SHAPES = [(8, 64), *[(16, 64)] * 3, *[(16, 128)] * 3, *[(16, 256)] * 2]  # (rows, tokens) of the steps, by hand


@pytest.mark.parametrize("dp", [1, 2, 4])
def test_every_token_comes_once_on_any_number_of_ranks(small_data: Path, dp: int) -> None:
    """The rows of all steps, put one behind the other, are the rows of a run without ramps."""
    train = TrainConfig(
        steps=9,
        seq_len=64,
        micro_batch_seqs=2,
        global_batch_seqs=8,
        batch_ramp=[BatchRamp(from_tokens=500, global_batch_seqs=16)],
        seq_ramp=[SeqRamp(from_tokens=3000, seq_len=128), SeqRamp(from_tokens=8000, seq_len=256)],
    )
    assert [(p.global_batch_seqs, p.seq_len) for p in (phase_at(train, n) for n in range(9))] == SHAPES
    rows = TextRows(str(small_data / "shards"), "train", 256, 1, mask_documents=False)
    seen = []
    for step in range(train.steps):
        phase = phase_at(train, step)
        ranks = [SimpleNamespace(dp_size=dp, dp_rank=rank) for rank in range(dp)]
        shares = [phase_batches(rows, phase, step, 0, train.micro_batch_seqs, rank) for rank in ranks]
        assert {b.input_ids.shape for share in shares for b in share} == {(2, phase.seq_len)}
        seen += [batch.input_ids.flatten() for turn in zip(*shares, strict=True) for batch in turn]
    tokens = torch.cat(seen)
    assert len(tokens) == total_tokens(train) == 512 + 3 * 1024 + 3 * 2048 + 2 * 4096
    assert torch.equal(tokens.view(-1, 256), rows.batch(range(len(tokens) // 256)).input_ids)


def test_rope_changes_in_every_part() -> None:
    config = ModelConfig(num_layers=1, hidden_size=16, ffn_size=16, num_heads=2, num_kv_heads=2, head_dim=8)
    later = config.model_copy(update={"rope_theta": 50.0, "rope_scaling": RopeScaling(original_max_positions=8)})
    part, fresh = Decoder(config), Decoder(later)
    for model in (part, fresh):
        initialize(model, config, 0)
    ids, positions = torch.arange(12)[None], torch.arange(12)[None]
    before = part(ids, positions)
    job = SimpleNamespace(model=config, engine=SimpleNamespace(parts=[Decoder(config), part]))
    set_rope(job, later)
    assert torch.equal(part(ids, positions), fresh(ids, positions)) and not torch.equal(part(ids, positions), before)
    assert [p.config for p in job.engine.parts] == [later, later] and job.model == later
    set_rope(job, config)  # a guard may go back behind the change
    assert torch.equal(part(ids, positions), before)


@pytest.mark.timeout(600)
def test_killed_in_a_phase_goes_on_bit_for_bit(small: Path, tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"

    done = run_alone("llmtrain", "pretrain", small, f"run_dir={straight}", *RAMPS)
    assert done.returncode == 0, done.stdout[-3000:]
    assert [(line["global_batch_seqs"], line["seq_len"]) for line in metrics(straight)] == SHAPES
    assert metrics(straight)[-1]["tokens"] == 512 + 3 * 1024 + 3 * 2048 + 2 * 4096
    accident = [{"attempt": 0, "rank": 0, "at": "step", "count": 6}]  # behind the second of three steps of 16 x 128
    env = {"ACCIDENTS": json.dumps(accident)}
    done = run_alone(FAULTS, "pretrain", small, f"run_dir={killed}", *RAMPS, env=env)
    assert done.returncode == -signal.SIGKILL and len(metrics(killed)) == 5
    done = run_alone("llmtrain", "pretrain", small, f"run_dir={killed}", *RAMPS)
    assert done.returncode == 0 and "resumed" in done.stdout, done.stdout[-3000:]
    same = ("step", "loss", "grad_norm", "lr", "tokens", "seq_len", "global_batch_seqs")
    assert [[line[k] for k in same] for line in metrics(killed)] == [
        [line[k] for k in same] for line in metrics(straight)
    ]
    assert (killed / "evaluations.jsonl").read_text() == (straight / "evaluations.jsonl").read_text()
    assert_same_weights(killed / "checkpoints/step-00000009", straight / "checkpoints/step-00000009")
    assert fields_from_directory(str(killed), {})["rope_theta"] == 50000
    reader = CheckpointReader(str(killed / "checkpoints/step-00000009"))
    other = load(str(small), [*RAMPS[:1], *RAMPS[2:]])
    with pytest.raises(ValueError, match=r"train.seq_ramp=\[\]: must stay \[.*50000"):
        engines = {"policy": SimpleNamespace(optim=other.optim)}
        check_same_run(Job(other, RECIPE, resolve_model(other.model), None, None, None, engines), reader, "x")
    with pytest.raises(ValueError, match=r"model.rope_theta=10000.0: .* was trained with 50000.0"):
        weight_source(str(killed), resolve_model(other.model))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "layout", [("parallel.pp=2", "engine.zero_stage=2"), ("parallel.tp=2",), ("parallel.dp_shard=2",)]
)
def test_a_ramp_is_the_same_on_other_layouts(
    layout: tuple[str, ...], small: Path, tmp_path: Path, forked: Callable
) -> None:
    base = ("llmtrain", "pretrain", small)
    one = forked(1, *base, f"run_dir={tmp_path / 'one'}", *RAMPS)
    other = forked(2, *base, f"run_dir={tmp_path / 'other'}", *RAMPS, *layout)
    assert one.returncode == other.returncode == 0, other.stdout[-3000:]
    assert losses(tmp_path / "other") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)  # fp32, other order of sums
