"""GRPO on a model with experts that the generator chose: colocated and over the link, with text and a reference."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llmtrain.arch.resolve import resolve_model
from llmtrain.config.load import load
from llmtrain.model.decoder import init_tensor, parameter_shapes
from llmtrain.model.hf_write import save_hf

WORKER = Path(__file__).parents[1] / "several_runs.py"
MOE = {"family": "qwen3-moe", "moe": {"num_experts": 8, "top_k": 2, "expert_ffn_size": 16, "balance": "none"}}
LETTERS = "def score(completion, example):\n    return completion.count('e') / max(1, len(completion))\n"
SETTINGS = (
    *("train.steps=2", "optim.warmup_steps=0", "checkpoint.every_steps=0", "grpo.kl_coef=0.1"),
    *("data.replay_seqs=2", "rollout.max_logprob_gap=1e-4", "grpo.prompts_per_step=8", "grpo.mismatch=truncate"),
)


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def start(small: Path, small_data: Path, tmp_path: Path) -> list[str]:
    """Returns the arguments of a run from random weights, rewarded for the letter e."""
    model = resolve_model(load(str(small), [f"model={json.dumps(shape(small))}"]).model)
    weights = ((name, init_tensor(name, shape, model, 0)) for name, shape in parameter_shapes(model).items())
    save_hf(str(tmp_path / "hf"), model, weights, torch.float32, str(small_data / "tokenizer"), 1)
    (tmp_path / "mine.py").write_text(LETTERS)
    rewards = [{"function": f"{tmp_path}/mine.py:score", "unsandboxed": True}]
    own = (f"model={json.dumps({'init_from': str(tmp_path / 'hf')})}", f"rewards={json.dumps(rewards)}")
    return ["grpo", str(small), *own, *SETTINGS]


def shape(small: Path) -> dict:
    """Returns the model section with experts in every layer."""
    return load(str(small), []).model.model_dump(exclude_unset=True, mode="json") | MOE


@pytest.mark.slow
def test_the_same_numbers_as_without_in_fp32(start: list[str], tmp_path: Path, forked: Callable) -> None:
    """In fp32 both sides choose alike, so in the first update on a set of samples replay changes nothing but
    rounding, wherever they come from."""
    runs = {
        "plain": ["rollout.placement=separate", "rollout.workers=1"],
        "separate": ["rollout.placement=separate", "rollout.workers=1", "rollout.router_replay=true"],
        "pipeline": ["parallel.pp=2", "rollout.router_replay=true"],
    }
    asked = [[*start, f"run_dir={tmp_path / name}", *own] for name, own in runs.items()]
    done = forked(2, WORKER, json.dumps(asked), timeout_s=200)
    assert "exit codes [0, 0, 0]" in done.stdout, done.stdout[-4000:]
    plain = metrics(tmp_path / "plain")
    assert len(plain) == 2 and all(line["grad_norm"] > 0 and line["replay_loss"] > 5 for line in plain)
    for name in ("separate", "pipeline"):
        for here, there in zip(metrics(tmp_path / name), plain, strict=True):
            for key in ("loss", "grad_norm", "reward_mean", "kl", "replay_loss", "response_tokens_mean"):
                assert here[key] == pytest.approx(there[key], rel=1e-4, abs=1e-6), (name, key)
