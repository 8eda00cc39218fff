"""What the turns of a step hold and take, by hand: placements, frozen models, critics, the KV cache itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmtrain.arch.resolve import resolve_model
from llmtrain.config.load import load
from llmtrain.config.recipes import Recipe, planned_recipes
from llmtrain.config.schema import Config, ModelConfig
from llmtrain.rollout.cache import KVCache
from llmtrain.scaling.describe import main
from llmtrain.scaling.layouts import main as search_main
from llmtrain.scaling.plan import Plan, plan
from llmtrain.scaling.turns import heaviest, kv_cache_bytes, other_models, turns_of

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


@pytest.mark.parametrize("preset", ["llama3-8b", "gemma2-2b", "deepseek-v3"])
def test_the_cache_has_as_many_bytes_as_the_generators(preset: str) -> None:
    model = resolve_model(ModelConfig(preset=preset))
    cache = KVCache(model, 3, 8192, torch.bfloat16, torch.device("meta"))
    assert kv_cache_bytes(model, 3, 8192, 2) == cache.memory_bytes


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


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("rollout.placement=ahead", "turns        not planned: rollout.placement=ahead: 8 processes"),
        ("rollout.generator=vllm", "turns        not planned: rollout.generator=vllm: a server"),
    ],
)
def test_what_is_not_planned_has_no_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, said: str
) -> None:
    config, _, _ = found(tmp_path, "grpo: {prompts_per_step: 64}", override, "rollout.workers=8", "plan.gpus=16")
    main(config)
    printed = capsys.readouterr().out
    assert said in printed and "fits" not in printed and "step  " not in printed and "hardware" in printed
    with pytest.raises(ValueError, match="which is not planned; search with colocated or separate"):
        search_main(config)
