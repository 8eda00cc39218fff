"""The plan's arithmetic against published tables and against sums done by hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from llmtrain import cli
from llmtrain.arch.resolve import resolve_model
from llmtrain.config.load import load
from llmtrain.config.recipes import RECIPES, config_class
from llmtrain.config.schema import Config, EngineConfig, ModelConfig, ParallelConfig, RolloutConfig, TrainConfig
from llmtrain.scaling.attention import attention_bytes
from llmtrain.scaling.describe import main
from llmtrain.scaling.plan import bubble_share, plan, step_of


def test_parameters_of_the_fullest_rank() -> None:
    """By hand, 5 layers of 16: the first of two stages holds 3 and the embedding; with 4 the last, by the norm."""
    block, matrix = 4 * 128 * 128 + 3 * 128 * 384 + 2 * 128, 1024 * 128
    for layers, largest in ((5, 3 * block + matrix), (4, 2 * block + matrix + 128)):
        config = Config(model=ModelConfig(num_layers=layers, tie_embeddings=False), parallel=ParallelConfig(pp=2))
        assert plan(config, 2).parameters_per_rank == largest


def test_attention_by_hand() -> None:
    """tests/parity/activations_test.py holds it to the peaks of the allocator."""
    model = resolve_model(ModelConfig(num_kv_heads=2))  # 4 heads of 32
    q, kv, layers, T = 4 * 32, 2 * 2 * 32, 4, 2048

    def found(method: str, cp: int = 4, tokens: int = T, **engine: object) -> int:
        train = TrainConfig(seq_len=tokens, micro_batch_seqs=2, global_batch_seqs=2)
        parallel = ParallelConfig(cp=cp, context=method)
        config = Config(train=train, parallel=parallel, engine=EngineConfig(precision="bf16", **engine))
        return attention_bytes(config, model, {"pp": 1, "cp": cp, "tp": 1}, layers)

    tokens = 2 * T // 4
    assert found("ring", cp=1) == 0
    assert found("ring") == tokens * (kv * 2 + (3 * kv + q) * 4)
    assert found("allgather") == tokens * 2 * (layers * 3 * kv + 2 * 4 * kv)
    assert found("alltoall") == tokens * 2 * (layers * (q + 2 * kv - kv) + 2 * (q + 2 * kv))  # 2 heads for 4 ranks
    assert found("allgather", remat="full") == tokens * 2 * (3 * kv + 2 * 4 * kv)
    mask = 2 * T * T * (1 + layers * 2)  # bool, and in bf16 for each layer
    assert found("ring", attention="sdpa") == found("ring")
    assert found("ring", cp=1, attention="sdpa") == mask
    assert found("alltoall", attention="sdpa") == found("alltoall") + mask
    assert found("allgather", attention="sdpa") == found("allgather") + mask // 4
    assert found("alltoall", cp=1, tokens=512) == mask // 16  # too short for flex and tiles


def test_bubble() -> None:
    """tests/parallel/bubble_test.py compares it with the schedules themselves."""
    assert bubble_share("1f1b", 4, 1, 8) == 3 / 8
    assert bubble_share("1f1b", 1, 1, 8) == 0
    assert bubble_share("zbv", 4, 2, 8) == 1 / 16


def test_bubble_of_stages_that_are_not_equal() -> None:
    """112 pipeline stages of 126 layers have one or two: with 16 microbatches more than twice (P - 1) / (v m)."""
    parallel = ParallelConfig(pp=16, tp=8, schedule="interleaved_1f1b", virtual_stages=7)
    train = TrainConfig(seq_len=8192, global_batch_seqs=16)
    p = plan(config_class()(model=ModelConfig(preset="llama3-405b"), parallel=parallel, train=train), 128)
    assert p.bubble > 2 * bubble_share("interleaved_1f1b", 16, 7, 16)


def test_batch_arithmetic() -> None:
    config = config_class()(
        parallel=ParallelConfig(pp=2, tp=2),
        train=TrainConfig(steps=10, seq_len=128, micro_batch_seqs=2, global_batch_seqs=24),
    )
    p = plan(config, 12)
    assert p.mesh["dp_shard"] == 3 and p.accumulation == 4
    half = (p.work.hardware_blocks + p.work.hardware_attention) / 2  # of the layers, on either rank
    assert p.bubble == pytest.approx(half / (half + p.work.hardware_head) / 4)  # the second one's wait at both ends
    assert (p.tokens_per_step, p.total_tokens) == (24 * 128, 240 * 128)
    separate = config.model_copy(update={"rollout": RolloutConfig(placement="separate", workers=1, group_size=4)})
    assert plan(separate, 13, RECIPES["grpo"]).mesh == p.mesh
    assert plan(separate, 13, RECIPES["grpo"]).tokens_per_step == 32 * 4 * 256
    with pytest.raises(ValueError, match="must be the 13 trainer ranks"):
        plan(config, 13)


def test_microbatches_by_tokens() -> None:
    """Their tokens are what a forward holds, and as many microbatches as full rows make: 24 x 128 / (512 x 3)."""
    parallel = ParallelConfig(tp=4)
    train = {"steps": 10, "seq_len": 128, "global_batch_seqs": 24}
    rows = Config(parallel=parallel, train=TrainConfig(**train, micro_batch_seqs=4))
    tokens = Config(parallel=parallel, train=TrainConfig(**train, micro_batch_tokens=512))
    assert plan(tokens, 12, RECIPES["sft"]) == plan(rows, 12, RECIPES["sft"])
    assert plan(tokens, 12, RECIPES["sft"]).accumulation == 2
    odd = Config(parallel=parallel, train=TrainConfig(**train, micro_batch_tokens=600))
    assert plan(odd, 12, RECIPES["sft"]).accumulation == 2  # of 512 tokens each, in rows of 128
    wide = Config(parallel=parallel, train=TrainConfig(**train, micro_batch_tokens=1024))
    assert plan(wide, 12).memory.activations == 2 * plan(tokens, 12).memory.activations


def test_large_microbatches_hold_no_more_rows_than_there_are() -> None:
    """8 rows over 4 ranks are 2 a rank, in one microbatch, which has room for 8 of them."""
    for tokens, rows in ((512, 2), (128, 2), (64, 1)):
        train = TrainConfig(seq_len=64, global_batch_seqs=8, micro_batch_tokens=tokens)
        parallel = ParallelConfig(dp_shard=4)
        assert step_of(Config(train=train), parallel, 2 // rows).rows == rows


def test_offloaded_optimizer_state_is_not_on_the_device() -> None:
    config = Config(engine=EngineConfig(zero_stage=2, offload="optimizer"))
    assert plan(config, 2).memory.optimizer == 0


def test_main_prints_the_ranks_it_needs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    rollout = RolloutConfig(placement="separate", workers=3)
    main(config_class()(parallel=ParallelConfig(pp=2, tp=2), rollout=rollout))
    out = capsys.readouterr().out
    assert "ranks        7: pp 2 x dp_replicate 1 x dp_shard 1 x cp 1 x tp 2, and 3 for rollouts" in out
    assert (
        "at most 32 prompts x 8 samples x 256 tokens = 65,536 a step, in 1 updates" in out and "bubble       0." in out
    )
    monkeypatch.setenv("WORLD_SIZE", "8")
    main(config_class()(parallel=ParallelConfig(pp=2, tp=2)))
    assert "ranks        8: pp 2 x dp_replicate 1 x dp_shard 2" in capsys.readouterr().out
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(ValueError, match=r"^WORLD_SIZE=many: must be a positive number of ranks; unset it"):
        main(config_class()())
    monkeypatch.delenv("WORLD_SIZE")
    main(Config(model=ModelConfig(init_from="not/there")))  # an earlier stage may make it
    assert "cannot be planned yet\n  model.init_from=not/there: has neither" in capsys.readouterr().out


def test_a_stage_that_cannot_be_planned_sets_the_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("model: {preset: smollm2-135m}\n")
    assert cli.main(["plan", str(path), "parallel.dp_shard=0"]) == 2
    said = capsys.readouterr()
    assert said.out == "run (pretrain)\n  cannot be planned\n"
    assert said.err.startswith("run (pretrain): parallel.dp_shard=0: must be positive")
    assert cli.main(["plan", str(path), "plan.gpus=3"]) == 2  # 8 rows
    assert capsys.readouterr().err.startswith("run (pretrain): train.global_batch_seqs=8: must be a multiple of")
    path.write_text(RUN.replace("pretrain, ranks: 4}", "pretrain, ranks: 4, set: {parallel: {dp_shard: 0}}}"))
    with pytest.raises(ValueError, match=r"pretrain \(pretrain\): parallel.dp_shard=0: must be "):
        main(load(str(path), []))
    assert capsys.readouterr().out.count("parameters   134,515,008") == 1


def test_ramps_are_printed_phase_by_phase(capsys: pytest.CaptureFixture[str]) -> None:
    ramps = {
        "batch_ramp": [{"from_tokens": 5000, "global_batch_seqs": 16}],
        "seq_ramp": [{"from_tokens": 10_000, "seq_len": 256, "rope_theta": 5e5}],
    }
    config = Config(train=TrainConfig(steps=20, seq_len=128, **ramps))
    main(config)
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert "phases       from step 0, token 0: 8 x 128 = 1,024 tokens a step" in lines
    assert "from step 5, token 5,120: 16 x 128 = 2,048 tokens a step" in lines
    assert "from step 8, token 11,264: 16 x 256 = 4,096 tokens a step, rope_theta 500000" in lines
    assert "total        20 steps, 60,416 tokens" in lines
    steady = config.model_copy(update={"train": TrainConfig(steps=20, seq_len=256)})
    assert plan(config, 1).memory.activations == plan(steady, 1).memory.activations


RUN = """
name: q
model: {preset: smollm2-135m}
stages:
  - {name: data, command: data}
  - {name: pretrain, command: pretrain, ranks: 4}
  - {name: sft, command: sft, ranks: 4, set: {model: {preset: null, init_from: "{run}/pretrain"}}}
"""


def test_a_run_is_planned_stage_by_stage_without_torch(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    code = (
        "import sys; from llmtrain.config.load import load; from llmtrain.scaling.describe import main;"
        f"main(load({str(path)!r}, [])); assert sys.modules.keys().isdisjoint(('torch', 'numpy'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert (
        "data (data)\n  neither trains nor samples, and" in done.stdout
        and "batch        8 x 2048 tokens" in done.stdout
    )
    assert done.stdout.count("parameters   134,515,008") == 2
    assert "accumulation 2\n" in done.stdout
    assert load(str(path), []).name == "q"
