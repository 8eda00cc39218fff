"""Every cross-field rule: broken once, it says value, rule and remedy; kept, it is silent."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from llmtrain.arch.mesh import mesh_sizes
from llmtrain.config.load import ConfigError, load
from llmtrain.config.schema import Config, ParallelConfig
from llmtrain.rules import layout
from llmtrain.rules.check import check, violations

GOOD = {
    "model": {"num_kv_heads": 2},
    "train": {"seq_len": 128},
    "parallel": {"pp": 2, "tp": 2},
    "data": {"train": __file__},
    "tokenizer": {"path": str(Path(__file__).parent)},
}

ZBV = ["parallel.schedule=zbv", "parallel.virtual_stages=2"]
INTERLEAVED = ["parallel.schedule=interleaved_1f1b", "parallel.virtual_stages=2"]


def config(*overrides: str, folder: Path) -> Config:
    path = folder / "x.yaml"
    path.write_text(yaml.safe_dump(GOOD))
    return load(str(path), list(overrides))


@pytest.mark.parametrize(
    ("command", "world_size", "overrides", "expected"),
    [
        (
            "pretrain",
            4,
            ["parallel.pp=1", "parallel.tp=4", "model.num_heads=12", "model.num_kv_heads=3", "model.head_dim=8"],
            "model.num_kv_heads=3: must be a multiple of parallel.tp=4, or divide it",
        ),
        (
            "sft",
            4,
            ["train.micro_batch_tokens=127"],
            "train.micro_batch_tokens=127: must be at least train.seq_len",
        ),
        (
            "pretrain",
            4,
            ["train.micro_batch_tokens=512"],
            "train.micro_batch_tokens=512: is for .* of unequal length, .*; use",
        ),
        (
            "sft",
            4,
            ["train.micro_batch_tokens=512", "data.replay_seqs=4", f"data.path={Path(__file__).parent}"],
            "train.micro_batch_tokens=512: not with data.replay_seqs and parallel.pp=2, .*; use train.micro_batch_seqs",
        ),
        (
            "sft",
            4,
            ["train.micro_batch_tokens=512", *INTERLEAVED],
            "parallel.schedule=interleaved_1f1b: needs equal rounds .* with train.micro_batch_tokens; use",
        ),
        ("pretrain", 4, ["model.vocab_size=1025"], "model.vocab_size=1025: must be a multiple of parallel.tp=2"),
        ("pretrain", 4, ["model.ffn_size=383"], "model.ffn_size=383: must be a multiple of parallel.tp=2"),
        ("pretrain", 4, ["train.seq_len=127"], "train.seq_len=127: .*or set parallel.sequence_parallel=false"),
        ("pretrain", 4, ["model.num_layers=1"], "parallel.pp x virtual_stages=2: must be at most model.num_layers=1"),
        ("pretrain", 4, ["parallel.virtual_stages=2"], "parallel.virtual_stages=2: must be 1 with .*=1f1b; set it or"),
        ("sft", 4, ["parallel.schedule=zbv"], "parallel.virtual_stages=1: must be 2 with parallel.schedule=zbv; set"),
        (
            "sft",
            4,
            ["parallel.schedule=interleaved_1f1b"],
            "parallel.virtual_stages=1: must be at least 2 with .*; set",
        ),
        ("sft", 4, ["parallel.pp=1", *ZBV], "parallel.schedule=zbv: needs parallel.pp of at least 2; raise it or use"),
        ("sft", 4, ["engine.compile=true", *ZBV], "engine.compile=true: not with .*=zbv, .*; change it or use inter"),
        ("sft", 4, ["engine.backend=fsdp", *ZBV], "engine.reshard=true: not with .*=zbv, .*; change it or use inter"),
        ("sft", 4, ["engine.remat=selective", *ZBV], "engine.remat=selective: not with .*=zbv, .*; change it or use"),
        (
            "sft",
            4,
            ["engine.zero_stage=3", "engine.remat=selective"],
            "engine.remat=selective: not with engine.zero_stage=3, .*; use full, zero_stage 1 or 2, or engine.backend",
        ),
        ("sft", 4, ["engine.zero_stage=3", *ZBV], "engine.zero_stage=3: not with parallel.schedule=zbv, .*; change it"),
        (
            "pretrain",
            4,
            [*INTERLEAVED, "train.global_batch_seqs=5"],
            "parallel.schedule=interleaved_1f1b: .* at least pp=2, and 5 is not a multiple of 2 rounds; make it",
        ),
        (
            "sft",
            4,
            [*INTERLEAVED, "train.global_batch_seqs=4", "data.replay_seqs=3", "data.path=."],
            "parallel.schedule=interleaved_1f1b: .* and 7 is not a multiple of 3 rounds; make it a multiple of pp",
        ),
        ("pretrain", 4, ["model.hidden_size=130"], "model.hidden_size=130: must be a multiple of num_heads=4"),
        ("pretrain", 4, ["model.head_dim=31"], "model.head_dim=31: must be even"),
        (
            "pretrain",
            8,
            ["model.num_kv_heads=4", "model.num_heads=6", "model.head_dim=8"],
            "model.num_heads=6: .*num_kv_heads=4",
        ),
        (
            "pretrain",
            4,
            ["model.vocab_size=512", "tokenizer.path="],
            "model.vocab_size=512: must be at least tokenizer.vocab_size=1024",
        ),
        ("pretrain", 4, ["train.seq_len=4096"], "train.seq_len=4096: must be at most model.max_positions=2048"),
        ("pretrain", 6, [], "parallel: pp 2 x .* = 4 ranks: must be the 6 trainer ranks; change"),
        ("pretrain", 1, [], "parallel: pp 2 x .* = 4 ranks: must be the 1 trainer ranks; change"),
        ("pretrain", 4, ["parallel.dp_shard=0"], "parallel.dp_shard=0: must be positive, or -1"),
        ("sft", 8, ["train.global_batch_seqs=7"], "train.global_batch_seqs=7: .* = 1 x 2 = 2; change"),
        (
            "pretrain",
            4,
            ["engine.backend=fsdp", "engine.offload=nvme"],
            "engine.offload=nvme: not with engine.backend=fsdp, .*; use params",
        ),
        (
            "pretrain",
            4,
            ["engine.precision=fp16", "engine.zero_stage=0"],
            "engine.precision=fp16: drifts at engine",
        ),
        ("pretrain", 4, ["engine.loss_scale=8"], "engine.loss_scale=8: is for engine.precision=fp16, not bf16"),
        ("pretrain", 4, ["engine.offload=params"], "engine.offload=params: needs engine.zero_stage 3, not 1"),
        (
            "pretrain",
            4,
            ["engine.offload=nvme", "engine.zero_stage=3"],
            "engine.offload=nvme: needs engine.offload_path",
        ),
        (
            "pretrain",
            4,
            ["engine.precision=fp8", "model.ffn_size=376"],
            r"model.ffn_size / .*tp=2 = 188: must be a multiple",
        ),
        ("pretrain", 4, ["engine.precision=fp8", "engine.zero_stage=0"], "engine.precision=fp8: drifts at engine"),
        (
            "pretrain",
            8,
            ["parallel.cp=2", "parallel.tp=1", "train.seq_len=126"],
            "train.seq_len=126: must be a multiple of 4, .* or lower cp",
        ),
        (
            "pretrain",
            16,
            ["parallel.cp=2", "parallel.tp=4", "model.num_kv_heads=4", "train.seq_len=124"],
            "train.seq_len=124: must be a multiple of 8, .* tp with sequence_parallel",
        ),
        (
            "pretrain",
            16,
            ["parallel.cp=4", "parallel.context=alltoall"],
            "parallel.context=alltoall: model.num_heads=4 / parallel.tp=2 must be a multiple of parallel.cp=4",
        ),
        ("pretrain", 4, ["parallel.ep=2"], "parallel.ep=2: the model has no experts; set parallel.ep=1"),
        (
            "pretrain",
            8,
            ["parallel.ep=2", "model.moe={}", "engine.backend=fsdp", "engine.remat=selective"],
            "engine.remat=selective: not with engine.backend=fsdp and parallel.ep=2, .*; use full",
        ),
        ("pretrain", 4, ["parallel.ep=2", "model.moe={}"], "parallel.ep=2: must divide dp_shard x cp = 1"),
        (
            "pretrain",
            8,
            ["parallel.ep=2", "model.moe={}", "engine.zero_stage=3"],
            "parallel.ep=2: not with engine.zero_stage=3 and parallel.pp=2",
        ),
        (
            "pretrain",
            8,
            ["parallel.ep=2", "model.moe={num_experts: 6}"],
            "model.moe.num_experts=6: must be a multiple of parallel.ep x tp = 4",
        ),
        ("pretrain", 4, ["model.moe={top_k: 9}"], "model.moe.top_k=9: must be at most num_experts=8"),
        ("pretrain", 4, ["model.moe={balance: bias}"], "model.moe.balance=bias: moves model.moe.selection_bias"),
        ("pretrain", 4, ["model.norm_bias=true"], "model.norm_bias=true: an RMSNorm has no bias"),
        (
            "pretrain",
            4,
            ["model.layer_types=[sliding]"],
            "model.layer_types: has sliding layers, which need model.slid",
        ),
        ("pretrain", 4, ["model.mla={}"], "model.attention=gqa: model.mla goes with attention: mla"),
        (
            "pretrain",
            8,
            ["parallel.cp=2", "model.layer_types=[sliding]", "model.sliding_window=8"],
            "model.sliding_window=8: not with parallel.context=ring",
        ),
        (
            "sft",
            4,
            ["train.batch_ramp=[{from_tokens: 9, global_batch_seqs: 16}]"],
            "train.batch_ramp: must be empty, only pretrain has ramps; remove it from sft",
        ),
        (
            "pretrain",
            4,
            ["train.batch_ramp=[{from_tokens: 9, global_batch_seqs: 16}, {from_tokens: 9, global_batch_seqs: 32}]"],
            "train.batch_ramp: from_tokens=.9, 9.: must rise from entry to entry; sort them",
        ),
        (
            "pretrain",
            4,
            ["train.seq_ramp=[{from_tokens: 9, seq_len: 192}]", "train.global_batch_seqs=192"],
            "train.seq_len=128: must divide the longest row of train.seq_ramp=192",
        ),
        (
            "pretrain",
            4,
            ["train.seq_ramp=[{from_tokens: 9, seq_len: 2048}]"],
            "train.global_batch_seqs=8: from token 0 .* = 1024 tokens: must be a multiple of the longest row, 2048",
        ),
        (
            "pretrain",
            4,
            ["train.seq_ramp=[{from_tokens: 9, seq_len: 4096}]", "train.global_batch_seqs=32"],
            "train ramp from token 4096: train.seq_len=4096: must be at most model.max_positions=2048",
        ),
        (
            "pretrain",
            8,
            ["train.batch_ramp=[{from_tokens: 9, global_batch_seqs: 9}]"],
            "train ramp from token 1024: train.global_batch_seqs=9: must be a multiple of .* = 1 x 2 = 2; change",
        ),
        (
            "plan",
            4,
            ["train.seq_ramp=[{from_tokens: 9, seq_len: 1}]", "train.global_batch_seqs=128"],
            "train ramp from token 16384: train.seq_len=1: must be a multiple of parallel.tp=2",
        ),
        (
            "pretrain",
            4,
            ["data.fim_share=0.7", "data.span_share=0.5"],
            "data.fim_share=0.7: must be at most 1 - data.span",
        ),
        ("pretrain", 8, ["parallel.dp_replicate=2"], "parallel.dp_replicate=2: .*; use parallel.dp_shard"),
        ("pretrain", 4, ["engine.zero_stage=0"], "engine.precision=bf16: drifts at engine.zero_stage=0"),
        (
            "pretrain",
            4,
            ["engine.offload=optimizer"],
            "engine.offload=optimizer: needs engine.zero_stage 2 or 3, not 1",
        ),
        (
            "pretrain",
            4,
            ["optim.name=muon", "engine.zero_stage=3"],
            "optim.name=muon: needs whole matrices, engine.zero_stage=3 gives .*; use engine.backend=fsdp or",
        ),
        ("pretrain", 4, ["optim.lr=1e-5"], "optim.min_lr=3e-05: must be at most optim.lr=1e-05"),
        (
            "sft",
            4,
            ["guard.spike=rewind", "guard.spike_window=99"],
            "checkpoint.every_steps=100: must be in 1 .. guard.spike_window=99 with guard.spike=rewind",
        ),
        ("sft", 4, ["guard.spike=skip", "guard.spike_window=1"], "guard.spike_window=1: must be at least 2"),
        ("sft", 4, ["guard.replica_check_steps=9"], "guard.replica_check_steps=9: needs data-parallel copies"),
        ("pretrain", 4, ["log.wandb=online"], "log.wandb=online: needs a key; run `wandb login`"),
        ("pretrain", 4, ["data.sources=[{name: a, type: text}]"], "data.sources.a.path: must be set"),
        ("data", 1, ["data.sources=[{name: a, type: text, path: no/x}]"], "data.sources.a.path=no/x: does not exist"),
        ("sft", 4, ["data.train=no.jsonl"], "data.train=no.jsonl: does not exist; give an existing path"),
        ("sft", 4, ["data.train="], "data.train: must be set, sft reads"),
        ("sft", 4, ["data.replay_seqs=1"], "data.path: must be set, data.replay_seqs takes text"),
        ("sft", 4, ["tokenizer.path=no"], "tokenizer.path=no: does not exist"),
        ("sft", 4, ["tokenizer.path="], "tokenizer.path: must be set, sft uses the tokenizer that the model knows"),
        ("sft", 4, ["model.init_from=no"], "model.init_from=no: does not exist; give the directory of a model"),
        ("grpo", 4, ["rollout.max_new_tokens=9"], "model.init_from: must be set, grpo starts from a trained model"),
        (
            "eval",
            1,
            ["eval.text=false", "eval.problems=0", "eval.tasks=[gcd]"],
            "model.init_from: must be set, eval starts",
        ),
        ("sft", 4, ["train.eval_every_steps=1"], "data.held_out: must be set, train.eval_every_steps measures the"),
        ("sft", 4, ["train.epochs=2", "train.steps=5"], "train.epochs=2: not together with train.steps=5; remove one"),
        (
            "pretrain",
            4,
            ["train.epochs=0.5"],
            "train.epochs=0.5: only sft or .* epochs; set train.steps in pretrain",
        ),
        ("sft", 4, ["data.train=no.jsonl"], "data.train=no.jsonl: does not exist; give an existing path"),
        ("sft", 4, ["data.train=no/such.csv:train"], "data.train=no/such.csv: does not exist; give an existing path"),
    ],
)
def test_one_broken_rule_is_one_line(
    command: str, world_size: int, overrides: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(ConfigError) as caught:
        check(config(*overrides, folder=tmp_path), world_size, command)
    assert "\n" not in str(caught.value)
    assert re.match(expected, str(caught.value))
    assert ";" in str(caught.value)


def test_the_harness_is_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def faults(*overrides: str) -> list[str]:
        with pytest.raises(ConfigError) as caught:  # there is no model either
            check(config("eval.text=false", "eval.problems=0", *overrides, folder=tmp_path), 1, "eval")
        return [line for line in str(caught.value).splitlines() if line.startswith("eval.lm_eval")]

    monkeypatch.setattr("llmtrain.rules.files.find_spec", lambda name: None)
    (line,) = faults("eval.lm_eval.tasks=[mmlu]")
    assert re.match(r"eval.lm_eval.tasks=mmlu: the .* is not installed; pip install .*eval", line)
    assert faults() == []  # nothing is asked of it
    monkeypatch.setattr("llmtrain.rules.files.find_spec", lambda name: name)
    assert faults("eval.lm_eval.tasks=[mmlu]") == []
    (line,) = faults("eval.lm_eval.include_path=no/where")
    assert line.startswith("eval.lm_eval.include_path=no/where: does not exist; give")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["rollout.placement=separate"], "rollout.workers=0: must be at least 1 with rollout.placement=separate"),
        (["rollout.placement=separate", "rollout.workers=4"], "rollout.workers=4: must be fewer than the 4 ranks"),
        (["rollout.placement=separate", "rollout.workers=1"], "parallel: pp 2 .* must be the 3 trainer ranks"),
        (
            ["grpo.prompts_per_step=30", "grpo.minibatches=4"],
            "grpo.prompts_per_step=30: .*multiple of grpo.minibatches=4",
        ),
        (["rollout.max_new_tokens=128"], "rollout.max_new_tokens=128: must be less than train.seq_len=128"),
        (["guard.spike=skip"], "guard.spike=skip: must be off in grpo"),
        (
            ["grpo.overlong_buffer=20", "rollout.max_new_tokens=19"],
            "grpo.overlong_buffer=20: must be at most rollout.max_new_tokens=19; lower it",
        ),
        (["grpo.dual_clip=3", "grpo.objective=gspo"], "grpo.dual_clip=3: is of grpo.objective=clip, not gspo; remove"),
        (["grpo.std_of=batch", "grpo.normalize_std=false"], "grpo.std_of=batch: .*normalize_std=false; remove one"),
        (
            ["grpo.objective=cispo", "grpo.clip_low=0.1"],
            "grpo.clip_low=0.1: grpo.objective=cispo has no clipping but ratio_cap; remove it, or set grpo.objective",
        ),
        (
            ["grpo.objective=cispo", "grpo.clip_high=0.28"],
            "grpo.clip_high=0.28: grpo.objective=cispo has no clipping but ratio_cap; remove it, or set grpo.objective",
        ),
        (
            ["grpo.ratio_cap=4", "grpo.objective=gspo"],
            "grpo.ratio_cap=4: is of grpo.objective=cispo, not gspo; remove it, or set grpo.objective=cispo",
        ),
        (
            ["grpo.kl_in=reward"],
            "grpo.kl_in=reward: there is no KL with grpo.kl_coef=0; remove it, or set kl_coef, such as 0.01",
        ),
        (["grpo.kl_form=k1"], "grpo.kl_form=k1: there is no KL with grpo.kl_coef=0; remove it, or set kl_coef, such "),
        (["grpo.mismatch_low=5"], "grpo.mismatch_low=5: must be below grpo.mismatch_high=5; lower it"),
        (["rollout.group_size=1"], "rollout.group_size=1: must be at least 2"),
        (INTERLEAVED, "parallel.schedule=interleaved_1f1b: .* in grpo .*; use 1f1b or zbv"),
    ],
)
def test_rules_of_reinforcement_learning(overrides: list[str], expected: str, tmp_path: Path) -> None:
    lines = violations(config(*overrides, f"model.init_from={tmp_path}", folder=tmp_path), 4, "grpo")
    assert [line for line in lines if re.match(expected, line)], lines


def test_keys_of_grpo_that_go_together(tmp_path: Path) -> None:
    for fine in (
        ["grpo.overlong_buffer=19", "rollout.max_new_tokens=19"],
        ["grpo.dual_clip=3", "grpo.std_of=batch", "grpo.mismatch_low=4.9"],
        ["grpo.objective=gspo", "grpo.clip_low=0.1", "grpo.clip_high=0.28"],
        ["grpo.objective=cispo", "grpo.ratio_cap=4", "grpo.clip_low=0.2"],
        ["grpo.kl_coef=0.1", "grpo.kl_in=reward", "grpo.kl_form=k1"],
    ):
        lines = violations(config(*fine, f"model.init_from={tmp_path}", folder=tmp_path), 4, "grpo")
        assert not [line for line in lines if line.startswith("grpo.")]


def test_rules_of_muon(tmp_path: Path) -> None:
    def lines(*overrides: str) -> list[str]:
        return violations(config("optim.name=muon", "engine.zero_stage=0", *overrides, folder=tmp_path), 4, "pretrain")

    assert lines("engine.precision=fp32") == lines("engine.precision=bf16", "engine.zero_stage=1") == []
    for stage in range(3):
        half = lines("engine.precision=fp16", f"engine.zero_stage={stage}")
        assert any(re.match("engine.precision=fp16: not with optim.name=muon", line) for line in half)
    for offload in ("optimizer", "params", "nvme"):
        found = lines("engine.precision=fp32", f"engine.offload={offload}", "engine.offload_path=x")
        assert any(re.match(f"engine.offload={offload}: must be none with optim.name=muon", line) for line in found)


def test_zero_bubble_needs_a_torch_that_splits_any_backward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "torch_version", lambda: (2, 11))
    with pytest.raises(ConfigError, match=r"=zbv: needs torch 2\.13 or later, .* this is 2\.11; install it or use"):
        check(config("engine.backend=fsdp", "engine.reshard=false", *ZBV, folder=tmp_path), 4, "sft")


def test_good_configurations_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for world_size in (4, 8, 16):
        check(config(folder=tmp_path), world_size, "pretrain")
    check(config("parallel.dp_shard=2", folder=tmp_path), 8, "sft")
    check(config("engine.zero_stage=0", "engine.precision=fp32", "parallel.dp_replicate=2", folder=tmp_path), 8, "sft")
    check(config("engine.zero_stage=3", "engine.offload=optimizer", folder=tmp_path), 4, "pretrain")
    fsdp = ["engine.backend=fsdp", "parallel.dp_replicate=2", "engine.offload=params", "engine.precision=fp16"]
    check(config(*fsdp, "engine.zero_stage=0", folder=tmp_path), 8, "pretrain")
    check(config("engine.backend=fsdp", "engine.zero_stage=3", "engine.compile=true", folder=tmp_path), 4, "sft")
    check(config("engine.backend=fsdp", "engine.reshard=false", *ZBV, folder=tmp_path), 4, "sft")
    check(config("parallel.sequence_parallel=false", "train.seq_len=127", folder=tmp_path), 4, "pretrain")
    check(config("optim.lr=1e-5", "optim.schedule=constant", folder=tmp_path), 4, "pretrain")
    guarded = ["guard.spike=rewind", "checkpoint.every_steps=128", "guard.replica_check_steps=10"]
    check(config(*guarded, folder=tmp_path), 8, "sft")
    check(config(folder=tmp_path), 1, "data")  # the mesh concerns only what trains
    ramps = [
        "train.batch_ramp=[{from_tokens: 2000, global_batch_seqs: 16}]",
        "train.seq_ramp=[{from_tokens: 9000, seq_len: 1024, rope_theta: 5e5}]",
    ]
    check(config(*ramps, "data.fim_share=0.5", "data.span_share=0.5", folder=tmp_path), 8, "pretrain")
    monkeypatch.setenv("WANDB_API_KEY", "x")
    check(config("log.wandb=online", folder=tmp_path), 4, "pretrain")


def test_a_stage_may_make_its_own_data(tmp_path: Path) -> None:
    made = ["data.tasks=[{name: t, type: largest}]", "run_dir=r", "data.train=r/data/t.jsonl", "tokenizer.path=r/t"]
    check(config(*made, folder=tmp_path), 4, "sft")
    with pytest.raises(ConfigError, match=r"data.train=elsewhere/t.jsonl: does not exist"):
        check(config(*made, "data.train=elsewhere/t.jsonl", folder=tmp_path), 4, "sft")


def test_a_name_with_the_signs_of_a_glob_is_there(tmp_path: Path) -> None:
    rows = tmp_path / "sp ace [1]*.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}')
    lines = violations(config(f"data.train={rows}", folder=tmp_path), 4, "sft")
    assert [line for line in lines if "does not exist" in line] == []


def test_a_link_to_nothing_is_told(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").symlink_to("gone.jsonl")
    lines = violations(config(f"data.train={tmp_path / 'x.jsonl'}", folder=tmp_path), 4, "sft")
    told = f"data.train={tmp_path / 'x.jsonl'}: is a link to gone.jsonl, which is not there; mend the link or give"
    assert any(line.startswith(told) for line in lines)


def test_all_violations_are_reported(tmp_path: Path) -> None:
    overrides = ["model.num_heads=3", "model.num_kv_heads=3", "model.head_dim=32"]
    lines = violations(config(*overrides, folder=tmp_path), 4, "pretrain")
    assert lines[0].startswith("model.num_heads=3: must be a multiple of parallel.tp=2")
    assert lines[1].startswith("model.num_kv_heads=3: must be a multiple of parallel.tp=2") and len(lines) == 2
    lines = violations(config("parallel.ep=2", "train.seq_len=129", "optim.lr=1e-6", folder=tmp_path), 5, "pretrain")
    assert [line.partition("=")[0].partition(":")[0] for line in lines] == [
        "parallel",
        "train.seq_len",
        "parallel.ep",
        "optim.min_lr",
    ]


def test_the_mesh_takes_what_is_left() -> None:
    assert mesh_sizes(ParallelConfig(pp=2, tp=2), 12) == {"pp": 2, "dp_replicate": 1, "dp_shard": 3, "cp": 1, "tp": 2}
    with pytest.raises(ValueError, match="= 8 ranks: must be the 12 trainer ranks"):
        mesh_sizes(ParallelConfig(pp=2, tp=2, dp_shard=2), 12)


RUN = """
name: q
run_dir: {folder}/q
model: {{num_kv_heads: 2}}
train: {{seq_len: 128}}
tokenizer: {{path: "{{run}}/tokenizer"}}
stages:
  - {{name: data, command: data}}
  - {{name: pretrain, command: pretrain, ranks: 4, set: {{parallel: {{tp: 2}}}}}}
  - name: sft
    command: sft
    ranks: {ranks}
    set:
      parallel: {{tp: 2}}
      model: {{init_from: "{{run}}/{source}"}}
      data: {{train: "{{run}}/data/a.jsonl"}}
"""


def run_faults(folder: Path, ranks: int, source: str) -> list[str]:
    path = folder / "run.yaml"
    path.write_text(RUN.format(folder=folder, ranks=ranks, source=source))
    try:
        check(load(str(path), []), 1, "run")
    except ConfigError as error:
        return str(error).splitlines()
    return []


def test_stages_are_checked_before_the_first_starts(tmp_path: Path) -> None:
    assert run_faults(tmp_path, 4, "pretrain") == []
    (line,) = run_faults(tmp_path, 3, "pretrain")
    assert line.startswith("stages.sft: parallel: pp 1 x") and "must be the 3 trainer ranks" in line
    (line,) = run_faults(tmp_path, 4, "pretrian")
    assert line.startswith(f"stages.sft: model.init_from={tmp_path}/q/pretrian: does not exist")


def test_a_stage_is_checked_with_the_shape_of_the_stage_before(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(RUN.format(folder=tmp_path, ranks=3, source="pretrain"))
    with pytest.raises(ConfigError, match=r"stages.sft: model.num_heads=4: must be a multiple of parallel.tp=3"):
        check(load(str(path), ["stages.sft.set.parallel.tp=3"]), 1, "run")


def test_a_run_document_is_for_run(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(RUN.format(folder=tmp_path, ranks=4, source="pretrain"))
    run = load(str(path), [])
    with pytest.raises(ConfigError, match="pretrain takes one stage; start this document with `llmtrain run`"):
        check(run, 1, "pretrain")
    with pytest.raises(ConfigError, match="WORLD_SIZE=4: run starts the processes of its stages itself"):
        check(run, 4, "run")


def test_an_evaluation_needs_room_for_its_answers(tmp_path: Path) -> None:
    wanted = "rollout.max_new_tokens=128: must be less than train.seq_len=128, which holds the prompt too; lower it or"
    for problems, count in ((4, 1), (0, 0)):
        keys = [f"eval.problems={problems}", "rollout.max_new_tokens=128"]
        found = violations(config(*keys, folder=tmp_path), 1, "eval")
        assert sum(line.startswith(wanted) for line in found) == count
