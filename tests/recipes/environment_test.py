"""Every recipe that samples, with an environment, as a user runs it: colocated, and by a rollout rank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmtrain.data.chat import CHATML
from tests.forked import run_forked

WORKER = Path(__file__).parents[1] / "several_runs.py"
OWN = Path(__file__).parents[1] / "envs" / "own.py"
RECIPES = {
    "grpo": ("grpo.prompts_per_step=2",),
    "raft": ("raft.prompts_per_step=2", "raft.minibatches=1", "raft.min_reward=-9"),
    "ppo": ("ppo.prompts_per_step=2", "ppo.minibatches=1", "ppo.kl_coef=0.0"),
    "distill": ("distill.on_policy=true", "distill.prompts_per_step=2"),
}


@pytest.fixture(scope="module")
def files(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    from llmtrain.config.load import load
    from llmtrain.model.decoder import init_tensor, parameter_shapes
    from llmtrain.model.hf_write import save_hf
    from tests.small_run import DOCUMENT

    base = tmp_path_factory.mktemp("episodes")
    (base / "small.yaml").write_text(DOCUMENT.format(data=small_data))
    (base / "chatml.jinja").write_text(CHATML)
    (base / "rows.jsonl").write_text("".join(json.dumps({"number": i}) + "\n" for i in range(8)))
    config = load(str(base / "small.yaml"), []).model
    weights = ((name, init_tensor(name, shape, config, 0)) for name, shape in parameter_shapes(config).items())
    save_hf(str(base / "hf"), config, weights, torch.float32, str(small_data / "tokenizer"), 1)
    return base


def arguments(files: Path, recipe: str, name: str, *overrides: str) -> list[str]:
    """Returns the command line of a run whose turns end at any of a few letters, after eight tokens at most."""
    environment = {"function": f"{OWN}:Guess", "unsandboxed": True, "max_turns": 3, "threads": 2}
    rollout = {"environment": environment, "stop": list("aeiou0123456789"), "group_size": 3, "max_new_tokens": 8}
    teacher = [f"distill.teacher=[{{path: {files / 'hf'}}}]"] if recipe == "distill" else []
    return [
        *(recipe, str(files / "small.yaml"), f"run_dir={files / name}", *RECIPES[recipe], *teacher),
        *(f"model={{init_from: {files / 'hf'}}}", f"data.train={files / 'rows.jsonl'}", "rewards=[]"),
        *(f"tokenizer.chat_template={files / 'chatml.jinja'}", f"rollout={json.dumps(rollout)}"),
        *("train.steps=2", "train.seq_len=250", "checkpoint.every_steps=0", *overrides),
    ]


def check(run_dir: Path) -> list[dict]:
    """Asserts that steps were made of episodes, on which generator and trainer agree. Returns the metrics."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["environment_tokens_mean"] > 0 and line["turns_mean"] > 1 for line in lines)
    assert all(line.get("logprob_gap_max", 0.0) < 1e-4 for line in lines)  # fp32: the same numbers but for rounding
    samples = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    assert any("turns" in sample for sample in samples)
    return lines


@pytest.mark.slow
def test_every_recipe_that_samples(files: Path) -> None:
    names = list(RECIPES)
    runs = [arguments(files, recipe, recipe) for recipe in names]
    result = run_forked(1, WORKER, json.dumps(runs), timeout_s=240)
    assert f"exit codes {[0] * len(runs)}" in result.stdout, result.stdout[-3000:]
    for recipe in names:
        check(files / recipe)


@pytest.mark.slow
def test_a_rollout_rank_does_the_same(files: Path) -> None:
    """Two trainers, colocated, and one with a rollout rank: the same episodes, and so the same numbers but for the
    order of sums."""
    apart = ("rollout.placement=separate", "rollout.workers=1")
    both = [arguments(files, "grpo", "together"), arguments(files, "grpo", "apart", *apart)]
    result = run_forked(2, WORKER, json.dumps(both), timeout_s=240)
    assert "exit codes [0, 0]" in result.stdout, result.stdout[-3000:]
    one, other = check(files / "together"), check(files / "apart")
    for key in ("reward_mean", "turns_mean", "environment_tokens_mean", "response_tokens_mean"):
        assert one[0][key] == other[0][key]


@pytest.mark.slow
def test_a_template_that_rewrites_earlier_turns(files: Path) -> None:
    """As Qwen3's thinking models: a thought is opened for the policy, and left out once a user answers. Two steps of
    GRPO and of PPO, on rows on which generator and trainer agree; those of GRPO are recorded, and replayed, in step
    and ahead; and by a rollout rank."""
    from safetensors.torch import load_file

    opened = CHATML.replace("assistant\\n' }}{% endif %}", "assistant\\n<think>\\n' }}{% endif %}")
    assert opened != CHATML
    (files / "opened.jinja").write_text(opened)
    own = (f"tokenizer.chat_template={files / 'opened.jinja'}", "rollout.environment.rewritten=new_row")
    saved = (*own, "checkpoint.every_steps=2")
    ahead = [f"rollout.{key}" for key in ("placement=ahead", "workers=1", "max_staleness=1", "verify=checksum")]
    runs = [
        arguments(files, "grpo", "rewritten", *saved, "rollout.record=true"),
        arguments(files, "grpo", "again", *saved, f"rollout.replay={files / 'rewritten' / 'rollouts'}"),
        arguments(files, "ppo", "rewritten-ppo", *own),
        arguments(files, "grpo", "ahead", *saved, *ahead, "rollout.record=true"),
        arguments(files, "grpo", "ahead-again", *saved, *ahead, f"rollout.replay={files / 'ahead' / 'rollouts'}"),
    ]
    result = run_forked(1, WORKER, json.dumps(runs), timeout_s=240)
    assert "exit codes [0, 0, 0, 0, 0]" in result.stdout, result.stdout[-3000:]
    apart = arguments(files, "grpo", "rewritten-apart", *own, "rollout.placement=separate", "rollout.workers=1")
    result = run_forked(2, WORKER, json.dumps([apart]), timeout_s=240)
    assert "exit codes [0]" in result.stdout, result.stdout[-3000:]
    for name in ("rewritten", "rewritten-ppo", "rewritten-apart", "ahead"):
        lines = check(files / name)
        assert all(line["step_samples"] == 6 and 1 < line["rows_mean"] == line["turns_mean"] <= 3 for line in lines)
        assert all(line["reward_errors"] == 0 for line in lines)
    for pair in (("rewritten", "again"), ("ahead", "ahead-again")):
        one, other = (next((files / name / "checkpoints").rglob("*.safetensors")) for name in pair)
        weights, replayed = load_file(one), load_file(other)
        assert weights and all((weights[name] == replayed[name]).all() for name in weights)
