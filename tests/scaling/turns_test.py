"""What the turns of a step hold and take, by hand: placements, servers, frozen models, critics, episodes."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtrain.arch.resolve import resolve_model
from llmtrain.config.load import load
from llmtrain.config.recipes import Recipe, planned_recipes
from llmtrain.config.recipes.base import SIDES
from llmtrain.config.schema import Config
from llmtrain.envs.nim import Nim
from llmtrain.scaling.describe import main
from llmtrain.scaling.layouts import main as search_main
from llmtrain.scaling.plan import Plan, plan
from llmtrain.scaling.turns import heaviest, other_models, turns_of
from llmtrain.scaling.turntime import Job, step_of_turns

DOCUMENT = """
model: {preset: llama3-8b}
parallel: {tp: 2, dp_shard: 8}
engine: {backend: fsdp, remat: full}
train: {seq_len: 4096, micro_batch_seqs: 1, steps: 100}
rollout: {group_size: 16, max_new_tokens: 3072}
rewards: [{name: math}]
plan: {hardware: h100}
"""
N, BLOCK = 8_030_261_248, 218_112_000  # parameters, and those of a block


def found(tmp_path: Path, section: str, *overrides: str, ranks: int = 16) -> tuple[Config, Recipe, Plan]:
    (tmp_path / "x.yaml").write_text(DOCUMENT + section)
    config = load(str(tmp_path / "x.yaml"), list(overrides))
    (recipe,) = planned_recipes(config)
    return config, recipe, plan(config, ranks, recipe)


def turns(config: Config, recipe: Recipe, p: Plan) -> dict[str, dict[str, int]]:
    model = resolve_model(config.model)
    return turns_of(config, model, recipe, p, other_models(config, model, recipe, {}))


def test_colocated(tmp_path: Path) -> None:
    """64 prompts on 16 ranks: 4 x 16 sequences each, of 2 x 8 heads x 128 numbers a token and layer."""
    config, recipe, p = found(tmp_path, "grpo: {prompts_per_step: 64, kl_coef: 0.01}")
    each = turns(config, recipe, p)
    assert list(each) == ["sampling", "scoring", "updating"] and heaviest(each)[0] == "sampling"
    assert each["sampling"]["generator"] == each["updating"]["generator"] == 2 * N
    assert each["sampling"]["KV cache"] == 64 * 4096 * 32 * 2 * 8 * 128 * 2
    assert each["sampling"]["frozen models"] == pytest.approx(2 * N / 16, rel=1e-3)  # tp 2, and 8 shards
    assert each["sampling"]["policy"] == pytest.approx(12 * N / 16, rel=1e-3)
    assert each["scoring"]["gathered"] == pytest.approx(2 * 2 * BLOCK / 2, rel=1e-3)
    assert "gradients" not in each["sampling"] and "KV cache" not in each["updating"]


def test_separate_workers_have_the_generator_alone(tmp_path: Path) -> None:
    config, recipe, p = found(
        tmp_path, "grpo: {prompts_per_step: 64}", "rollout.placement=separate", "rollout.workers=8", ranks=24
    )
    each = turns(config, recipe, p)
    assert set(each["rollout workers"]) == {"generator", "KV cache", "prompts"}
    assert each["rollout workers"]["KV cache"] == 128 * 4096 * 32 * 2 * 8 * 128 * 2
    assert "generator" not in each["updating"] and "frozen models" not in each["scoring"]


def test_models_that_wait_are_not_there_in_the_turns_of_others(tmp_path: Path) -> None:
    section = "ppo: {prompts_per_step: 64, kl_coef: 0.01, wait_on_host: WAIT}"
    here, away = (turns(*found(tmp_path, section.replace("WAIT", wait))) for wait in ("false", "true"))
    critic = here["updating"]["critics"]
    assert critic == pytest.approx(12 * (N - 128_256 * 4096) / 16, rel=1e-3)  # a number a position for a head
    assert here["updating the critic"]["critics"] == away["updating the critic"]["critics"] == critic
    assert not {"critics", "frozen models"} & set(away["updating"]) and away["scoring"]["frozen models"] > 0


def test_pretraining_has_no_turns(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("model: {num_layers: 2}\n")
    config = load(str(tmp_path / "x.yaml"), [])
    assert turns(config, planned_recipes(config)[0], plan(config, 1)) == {}


def test_the_heaviest_turn_decides_what_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, _, _ = found(tmp_path, "grpo: {prompts_per_step: 64}", "plan.reserve_gb=30", "plan.gpus=16")
    main(config)
    out = capsys.readouterr().out
    assert "turns        sampling 57.9 GB (the heaviest): policy 6.02 GB, generator 16.1 GB, KV cache 34.4 GB" in out
    assert "most are KV cache, 34.4 GB: lower rollout.max_batch_seqs" in out
    assert " s at full lengths: sampling " in out and "run          2.26 hours, 36.2 GPU hours, 25.3 kWh" in out


def test_an_episode_of_several_turns_is_one_row(tmp_path: Path) -> None:
    """The cache is that of as many rows, whatever a turn may have; rounds of sampling come one after the other."""
    for section, overrides in (
        ("grpo: {prompts_per_step: 64}", ["rollout.environment.tools=[calculator]", "rollout.max_new_tokens=256"]),
        ("grpo: {prompts_per_step: 64, dynamic_rounds: 3}", []),
    ):
        config, recipe, p = found(tmp_path, section, *overrides)
        assert turns(config, recipe, p)["sampling"]["KV cache"] == 64 * 4096 * 32 * 2 * 8 * 128 * 2


def test_vllm_sleeps_while_a_gpu_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a CPU it cannot. 40 GiB hold 80 rows, and 64 are asked for: it decodes as fast as the native generator."""
    section = "grpo: {prompts_per_step: 64, kl_coef: 0.01}"
    served = ("rollout.generator=vllm", "rollout.vllm.cache_gib=40")
    each, own = turns(*found(tmp_path, section, *served)), turns(*found(tmp_path, section))
    assert set(each["sampling"]) == {"policy", "frozen models", "generator", "KV cache"}
    assert each["sampling"]["KV cache"] == 40 * 2**30 and each["sampling"]["generator"] == 2 * N
    assert {**each["updating"], "generator": 2 * N} == own["updating"] and "generator" not in each["scoring"]
    (tmp_path / "here.yaml").write_text("{name: X, bf16_tflops: 1, memory_gb: 400, memory_gb_per_s: 10, device: cpu}")
    each = turns(*found(tmp_path, section, *served, f"plan.hardware={tmp_path}/here.yaml"))
    assert each["updating"]["KV cache"] == 40 * 2**30 and each["scoring"]["server"] == 3_000_000_000
    config, _, _ = found(tmp_path, section, *served, "plan.gpus=16")
    out = planned_lines(config, capsys)
    assert "updating 28.6 GB: policy 6.02 GB, frozen models 1 GB, gradients" in out
    assert "sampling 46.3, scoring" in out  # as the native generator


def planned_lines(config: Config, capsys: pytest.CaptureFixture[str]) -> str:
    main(config)
    return capsys.readouterr().out


AHEAD = ("rollout.placement=ahead", "rollout.max_staleness=1", "rollout.verify=checksum", "engine.timeout_s=1800")


def test_sampling_ahead_takes_the_longer_of_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """4 trainers and 4 processes on one machine of 8 GPUs: each decodes 16 prompts of 16 samples. They are not part of
    the mesh, and no trainer has their model."""
    overrides = (*AHEAD, "rollout.workers=4", "parallel.dp_shard=2")
    config, recipe, p = found(tmp_path, "grpo: {prompts_per_step: 64}", *overrides, ranks=4)
    assert (p.ranks, p.rollout_ranks, p.mesh["dp_shard"]) == (8, 4, 2)
    each = turns(config, recipe, p)
    assert each["rollout workers"]["KV cache"] == 256 * 4096 * 32 * 2 * 8 * 128 * 2
    assert "generator" not in each["updating"]
    model = resolve_model(config.model)
    step = step_of_turns(Job(config, recipe, model, other_models(config, model, recipe, {}), p))
    seconds = dict(step.seconds)
    sampling = seconds.pop("sampling")
    assert step.total_s == max(sampling, sum(seconds.values())) > min(sampling, sum(seconds.values())) > 0
    assert "all ranks" not in step.sent_bytes["new weights"]  # they lie in memory of the machine
    config, _, _ = found(tmp_path, "grpo: {prompts_per_step: 64}", *overrides, "plan.gpus=4", ranks=4)
    out = planned_lines(config, capsys)
    assert "ranks        8: pp 1 x dp_replicate 1 x dp_shard 2 x cp 1 x tp 2, and 4 for rollouts" in out
    assert f"{step.total_s:.3g} s at full lengths: the longer of sampling {sampling:.3g} and " in out
    assert "hardware     8 x H100" in out


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            [*AHEAD, "rollout.workers=8"],
            "rollout.workers=8: what samples ahead is planned on one machine, ",
        ),
        (["rollout.generator=vllm", "rollout.tp=2"], "rollout.tp=2: which GPUs the processes of a server take"),
    ],
)
def test_what_is_not_planned_has_no_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], said: str
) -> None:
    config, _, _ = found(tmp_path, "grpo: {prompts_per_step: 64}", *overrides, "plan.gpus=16")
    printed = planned_lines(config, capsys)
    assert f"turns        not planned: {said}" in printed
    assert "fits" not in printed and "step  " not in printed and "hardware" in printed
    with pytest.raises(ValueError, match=rf"run \(grpo\): --search: {said}"):
        search_main(config)


def test_a_game_gives_a_row_of_each_side(tmp_path: Path) -> None:
    """16 x 64 episodes of two rows are trained, and one row of each is sampled at a time."""
    nim = ("rollout.environment.game=nim", "rollout.max_new_tokens=256", "rollout.environment.max_turns=40")
    config, recipe, p = found(tmp_path, "grpo: {prompts_per_step: 64}", *nim)
    assert SIDES == Nim.players == 2
    assert recipe.passes_of(config).seqs == 2048 and recipe.step_size(config).sample_tokens == 8192
    assert "64 prompts x 16 samples of 2 rows x 8192 tokens" in recipe.step_size(config).words
    assert turns(config, recipe, p)["sampling"]["KV cache"] == 64 * 4096 * 32 * 2 * 8 * 128 * 2
    config, recipe, _ = found(tmp_path, "grpo: {prompts_per_step: 64}", *nim, "plan.episode_rows=3")
    assert recipe.passes_of(config).seqs == 3072
    tools = ("grpo: {prompts_per_step: 64}", "rollout.environment.tools=[calculator]")
    config, recipe, _ = found(tmp_path, *tools)
    assert recipe.passes_of(config).seqs == 1024
    config, recipe, _ = found(tmp_path, *tools, "rollout.environment.rewritten=new_row")
    assert recipe.passes_of(config).seqs == 1024 * 8  # each of the turns may begin a row


def test_pairs_without_another_model_have_no_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their step has no fixed number of rows all the same."""
    config, recipe, p = found(tmp_path, "reward: {}", "model.head=scalar", "plan.gpus=16")
    assert turns(config, recipe, p) == {}
    left = 76e9 - p.memory_bytes
    out = planned_lines(config, capsys)
    assert f"fits         {left / 1e9:.3g} GB of 80 GB less 4" in out and "s at full lengths: updating " in out


def test_a_record_is_trained_on_without_sampling(tmp_path: Path) -> None:
    each = turns(*found(tmp_path, "grpo: {prompts_per_step: 64}", "rollout.replay=a/rollouts"))
    assert list(each) == ["scoring", "updating"] and "generator" not in each["updating"]
