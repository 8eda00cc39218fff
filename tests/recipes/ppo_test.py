"""PPO as a user runs it: policy, critic and reference on many layouts and in both engines against one rank, twice,
resumed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

WORKER = Path(__file__).parents[1] / "several_runs.py"
# The untrained policy now and then writes the digit that is asked for.
SETTINGS = (
    *("train.steps=3", "rewards=[{name: first_integer}]", "rollout.group_size=1", "rollout.max_new_tokens=24"),
    *("ppo.prompts_per_step=32", "ppo.minibatches=2", "ppo.epochs=2", "ppo.critic_warmup_steps=1"),
    *("ppo.critic_lr=3e-3", "ppo.kl_coef=0.05", "ppo.kl_target=0.01", "ppo.kl_horizon=100", "ppo.mismatch=truncate"),
    *("checkpoint.every_steps=2", "optim.lr=1e-3", "optim.eps=1e-6", "optim.schedule=constant"),
    "train.micro_batch_seqs=4",
)
NUMBERS = ("loss", "grad_norm", "critic_loss", "critic_grad_norm", "reward_mean", "response_tokens_mean")
NUMBERS += ("value_mean", "return_mean", "kl_sample", "kl_coef")
KEYS = {
    *("step", "loss", "grad_norm", "lr", "tokens", "reward_mean", "kl", "kl_old", "entropy", "clip_fraction"),
    *("logprob_gap_max", "critic_loss", "critic_lr", "explained_variance", "value_error", "value_clip_fraction"),
}


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def numbers(run_dir: Path) -> list[tuple[float, ...]]:
    """What does not depend on the clock."""
    return [tuple(m[name] for name in NUMBERS) for m in metrics(run_dir)]


@pytest.fixture(scope="module")
def start(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the configuration, problems answered by a digit, and an untrained Hugging Face model."""
    import torch

    from llmtrain.config.load import load
    from llmtrain.model.decoder import init_tensor, parameter_shapes
    from llmtrain.model.hf_write import save_hf
    from tests.small_run import DOCUMENT

    base = tmp_path_factory.mktemp("ppo")
    (base / "small.yaml").write_text(DOCUMENT.format(data=small_data))
    problems = [{"prompt": f"say {i % 3} {'x' * (i % 5)}:", "answer": str(i % 3)} for i in range(32)]
    (base / "problems.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))
    config = load(str(base / "small.yaml"), []).model
    shapes = parameter_shapes(config)
    weights = ((name, init_tensor(name, shape, config, 0)) for name, shape in shapes.items())
    save_hf(str(base / "hf"), config, weights, torch.float32, str(small_data / "tokenizer"), 1)
    return base


def arguments(start: Path, run_dir: Path, *overrides: str) -> list[str]:
    model = json.dumps({"init_from": str(start / "hf")})
    paths = (f"model={model}", f"data.train={start / 'problems.jsonl'}", f"run_dir={run_dir}")
    return ["ppo", str(start / "small.yaml"), *paths, *SETTINGS, *overrides]


@pytest.fixture(scope="module")
def run(start: Path) -> Callable[[int, dict[Path, tuple[str, ...]]], None]:
    """run(ranks, {run directory: overrides}): `llmtrain ppo` with each, by the same ranks."""
    from tests.forked import run_forked

    def launch(ranks: int, runs: dict[Path, tuple[str, ...]]) -> None:
        calls = [arguments(start, run_dir, *overrides) for run_dir, overrides in runs.items()]
        done = run_forked(ranks, WORKER, json.dumps(calls), timeout_s=280)
        assert f"exit codes {[0] * len(runs)}" in done.stdout, done.stdout[-3000:]

    return launch


@pytest.fixture(scope="module")
def alone(run: Callable, start: Path) -> Path:
    """One rank."""
    run(1, {start / "alone": ()})
    return start / "alone"


def test_records_what_happened(alone: Path) -> None:
    lines = metrics(alone)
    assert [line["step"] for line in lines] == [1, 2, 3] and set(lines[-1]) >= KEYS
    # the critic first; means over 4 updates, of which the first of each model has half the rate, optim.warmup_steps=2
    assert [line["lr"] for line in lines] == pytest.approx([0.0, 1e-3 * 3.5 / 4, 1e-3])
    assert [line["critic_lr"] for line in lines] == pytest.approx([3e-3 * 3.5 / 4, 3e-3, 3e-3])
    assert all(line["critic_grad_norm"] > 0 for line in lines) and any(line["reward_mean"] > 0 for line in lines)
    assert lines[1]["logprob_gap_max"] < 1e-4  # fp32: generator and trainer agree
    assert [line["mismatch_weight"] for line in lines[1:]] == pytest.approx([1.0, 1.0], abs=1e-4)
    assert abs(lines[0]["kl_sample"]) < 1e-4 and lines[2]["kl_sample"] != lines[0]["kl_sample"]
    # the policy is the reference up to the second step, whose KL is far below the target: 32 samples of 100 count
    assert [line["kl_coef"] for line in lines] == pytest.approx([0.05, 0.05, 0.05 * (1 - 0.2 * 0.32)])
    state = json.loads((newest(alone) / "state.json").read_text())
    assert state["recipe_state"]["kl_coef"] < lines[2]["kl_coef"] and list(state["roles"]) == ["critic"]
    assert (state["optimizer_step"], state["roles"]["critic"]["optimizer_step"]) == (2 * 4, 3 * 4)


def newest(run_dir: Path) -> Path:
    return run_dir / "checkpoints/step-00000003"


def assert_same(run_dir: Path, other: Path, first: int = 0) -> None:
    assert numbers(run_dir) == numbers(other)[first:]
    files = list(newest(other).glob("*.safetensors"))
    for file in files:
        again = load_file(newest(run_dir) / file.name)
        assert all(again[name].equal(tensor) for name, tensor in load_file(file).items())
    assert files


STAGES = ("parallel.pp=2", "parallel.cp=2", "engine.backend=fsdp")
MORE = {
    "tensor": ("parallel.tp=2", "ppo.wait_on_host=true"),
    "context": ("parallel.cp=2", "engine.zero_stage=3"),
    "length": ("parallel.pp=2", "ppo.length_alpha=0.05", "ppo.kl_in=loss", "data.replay_seqs=4", "ppo.mismatch=off"),
}


def assert_close(run_dir: Path, other: Path) -> None:
    """Same seeds, same tokens: only the order of sums differs."""
    for here, there in zip(numbers(run_dir), numbers(other), strict=True):
        assert here == pytest.approx(there, rel=2e-4, abs=2e-6), run_dir  # Adam's first steps enlarge rounding


def test_on_four_ranks_as_on_one_and_resumed_bit_for_bit(run: Callable, alone: Path, tmp_path: Path) -> None:
    """The last run goes on from the checkpoint in the middle, where the coefficient of the KL is to move."""
    run(4, {tmp_path / "whole": STAGES})
    assert_close(tmp_path / "whole", alone)
    shutil.copytree(tmp_path / "whole/checkpoints/step-00000002", tmp_path / "resumed/checkpoints/step-00000002")
    run(4, {tmp_path / "resumed": STAGES})
    assert_same(tmp_path / "resumed", tmp_path / "whole", first=2)


@pytest.mark.slow
def test_more_layouts_as_on_one_rank(run: Callable, alone: Path, tmp_path: Path) -> None:
    """Models that wait on the host, weights in shards, and other forms of the advantages and the KL."""
    run(4, {tmp_path / name: layout for name, layout in MORE.items()})
    run(1, {tmp_path / "other": MORE["length"][1:]})
    assert_close(tmp_path / "tensor", alone)
    assert_close(tmp_path / "context", alone)
    assert_close(tmp_path / "length", tmp_path / "other")


def test_adapters_and_a_critic_of_another_shape(run: Callable, start: Path, tmp_path: Path) -> None:
    """The reference of adapters is the policy without them; the critic starts from a classifier, to the bit, and hardly
    moves."""
    import torch

    from llmtrain.arch.resolve import resolve_model
    from llmtrain.checkpoint.load import CheckpointReader
    from llmtrain.checkpoint.roles import read_role
    from llmtrain.config.schema import ModelConfig
    from llmtrain.model.decoder import init_tensor, parameter_shapes
    from llmtrain.model.hf_write import save_hf

    shape = {"num_layers": 2, "hidden_size": 16, "ffn_size": 24, "num_heads": 2, "num_kv_heads": 2, "vocab_size": 512}
    scalar = resolve_model(ModelConfig.model_validate({**shape, "max_positions": 256, "head": "scalar"}))
    values = {name: init_tensor(name, shape, scalar, 7) for name, shape in parameter_shapes(scalar).items()}
    save_hf(str(tmp_path / "scalar"), scalar, values.items(), torch.float32, None, 1)
    model = json.dumps({"init_from": str(start / "hf"), "lora": {"rank": 4, "targets": ["q", "v", "down"]}})
    more = ("ppo.critic_lr=1e-30", "optim.lr=1e-2", "optim.grad_clip=0", "ppo.critic_warmup_steps=0")
    run(2, {tmp_path / "run": (f"model={model}", f"ppo.critic_from={tmp_path / 'scalar'}", "parallel.tp=2", *more)})
    lines = metrics(tmp_path / "run")
    assert abs(lines[0]["kl_sample"]) < 1e-4 < abs(lines[-1]["kl_sample"])  # the adapters moved, the reference did not
    critic = read_role(CheckpointReader(str(newest(tmp_path / "run"))), "critic")
    assert all(torch.equal(critic.full(name), value) for name, value in values.items())
    contents = json.loads((tmp_path / "run/run.json").read_text())["contents"]
    assert contents["ppo.critic_from"]["path"] == str(tmp_path / "scalar")
