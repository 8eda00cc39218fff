"""A generator that samples from another distribution than the trainer's: with the correction the policy learns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llmtrain.arch.resolve import resolve_model
from llmtrain.config.load import load
from llmtrain.model.decoder import init_tensor, parameter_shapes
from llmtrain.model.hf_write import save_hf
from tests.forked import run_forked
from tests.small_run import DOCUMENT

WORKER = Path(__file__).with_name("noisy_worker.py")
FORMS, SEEDS = ("off", "truncate"), (1, 2, 3)  # a change of the last bit moves a single run by a third
NOISE = 2.0  # standard deviation on every logit, in nats: log-probs differ by up to 6
REWARD = "def score(completion, example):\n    return completion.count('e') / max(1, len(completion))\n"
SETTINGS = (
    *("train.steps=50", "grpo.prompts_per_step=8", "rollout.group_size=8", "rollout.max_new_tokens=8"),
    *("optim.lr=1e-2", "optim.schedule=constant", "optim.warmup_steps=0", "checkpoint.every_steps=0"),
    "rollout.max_logprob_gap=1e9",  # the gate would stop such a run, and rightly
)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_learns_from_a_noisy_generator_with_the_correction_alone(small_data: Path, tmp_path: Path) -> None:
    """An untrained model is rewarded for the letter e; its first completions hold a share of 0.08. Without a correction
    a token that the trainer likes better than the noise lets it be sampled is clipped where it is right, and pushed
    down where it is wrong."""
    (tmp_path / "small.yaml").write_text(DOCUMENT.format(data=small_data))
    problems = [{"prompt": f"say {i % 3} {'x' * (i % 5)}:"} for i in range(16)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))
    (tmp_path / "mine.py").write_text(REWARD)
    model = resolve_model(load(str(tmp_path / "small.yaml"), []).model)
    weights = ((name, init_tensor(name, shape, model, 0)) for name, shape in parameter_shapes(model).items())
    save_hf(str(tmp_path / "hf"), model, weights, torch.float32, str(small_data / "tokenizer"), 1)

    def run(name: str, *overrides: str, command: str = "grpo") -> list[str]:
        places = (f"data.train={tmp_path}/problems.jsonl", f"run_dir={tmp_path / name}")
        start = json.dumps({"init_from": str(tmp_path / "hf")})
        own = json.dumps([{"function": f"{tmp_path}/mine.py:score"}])
        document = str(tmp_path / "small.yaml")
        return [command, document, *places, f"model={start}", f"rewards={own}", *SETTINGS, *overrides]

    runs = [
        *((NOISE, run(f"{form}-{seed}", f"grpo.mismatch={form}", f"seed={seed}")) for form in FORMS for seed in SEEDS),
        (0.0, run("bf16", "engine.precision=bf16", "train.steps=3")),
        (0.0, run("ppo", "engine.precision=bf16", "train.steps=3", "ppo.prompts_per_step=8", command="ppo")),
    ]
    result = run_forked(1, WORKER, json.dumps(runs), timeout_s=580)
    assert f"exit codes {[0] * len(runs)}" in result.stdout, result.stdout[-3000:]

    def lines(name: str) -> list[dict]:
        return [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    ends = {f: [sum(m["reward_mean"] for m in lines(f"{f}-{seed}")[-5:]) / 5 for seed in SEEDS] for f in FORMS}
    print(ends)
    assert sum(ends["truncate"]) / 3 > 0.65 and sum(ends["off"]) / 3 < 0.45
    assert min(ends["truncate"]) > max(ends["off"])
    for line in lines("bf16") + lines("ppo"):  # on by default where numbers are rounded, and hardly anything to do
        assert line["mismatch_weight"] == pytest.approx(1.0, abs=0.02) and line["mismatch_fraction"] < 0.01
        assert 0 < line["logprob_gap_max"] < 0.5 and line["mismatch_kl"] < 1e-3
