"""GRPO as a user runs it: workers apart or colocated, on one layout and another, twice, resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from tests.conftest import ROOT

WORKER = Path(__file__).parents[1] / "several_runs.py"
# The untrained policy now and then writes the digit that is asked for: some groups have a spread of rewards.
SETTINGS = (
    "train.steps=3",
    "grpo.reward=first_integer",
    "grpo.prompts_per_step=8",
    "grpo.minibatches=2",
    "grpo.dynamic_rounds=2",
    "rollout.group_size=8",
    "rollout.max_new_tokens=24",
    "train.micro_batch_seqs=4",
    "checkpoint.every_steps=2",
    "optim.lr=1e-3",
    "optim.schedule=constant",
)
SEPARATE = ("rollout.placement=separate", "rollout.workers=1")
KEYS = {
    *("step", "loss", "grad_norm", "lr", "tokens", "tokens_per_s", "step_s", "peak_bytes", "reward_mean", "kl_old"),
    *("entropy", "clip_fraction", "response_tokens_mean", "logprob_gap_max", "rollout_s", "train_s", "sync_s"),
    *("weight_version", "step_samples", "samples"),
}


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def numbers(run_dir: Path) -> list[tuple[float, ...]]:
    """What does not depend on the clock."""
    names = ("loss", "grad_norm", "reward_mean", "response_tokens_mean", "samples")
    return [tuple(m[name] for name in names) for m in metrics(run_dir)]


@pytest.fixture(scope="module")
def start(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the configuration, problems answered by a digit, and an untrained Hugging Face model."""
    import torch

    from llmtrain.config.load import load
    from llmtrain.model.decoder import init_tensor, parameter_shapes
    from llmtrain.model.hf_write import save_hf
    from tests.small_run import DOCUMENT

    base = tmp_path_factory.mktemp("grpo")
    (base / "small.yaml").write_text(DOCUMENT.format(data=small_data))
    problems = [{"prompt": f"say {i % 3} {'x' * (i % 5)}:", "answer": str(i % 3)} for i in range(16)]
    (base / "problems.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))
    config = load(str(base / "small.yaml"), []).model
    shapes = parameter_shapes(config)
    weights = ((name, init_tensor(name, shape, config, 0)) for name, shape in shapes.items())
    save_hf(str(base / "hf"), config, weights, torch.float32, str(small_data / "tokenizer"), 1)
    return base


@pytest.fixture(scope="module")
def run(start: Path) -> Callable:
    """run(ranks, {run directory: overrides}) -> CompletedProcess of `llmtrain grpo` with each, by the same ranks."""
    from tests.forked import run_forked

    def launch(ranks: int, runs: dict[Path, tuple[str, ...]]) -> subprocess.CompletedProcess[str]:
        model = json.dumps({"init_from": str(start / "hf")})
        paths = (f"model={model}", f"data.train={start / 'problems.jsonl'}")
        arguments = [
            ["grpo", str(start / "small.yaml"), *paths, f"run_dir={run_dir}", *SETTINGS, *overrides]
            for run_dir, overrides in runs.items()
        ]
        return run_forked(ranks, WORKER, json.dumps(arguments), timeout_s=240)

    return launch


def assert_good(result: subprocess.CompletedProcess[str], runs: int) -> None:
    assert f"exit codes {[0] * runs}" in result.stdout, result.stdout[-3000:]


@pytest.fixture(scope="module")
def separate(run: Callable, start: Path) -> Path:
    """Two trainers and one rollout worker."""
    assert_good(run(3, {start / "separate": SEPARATE}), 1)
    return start / "separate"


def test_records_what_happened(separate: Path) -> None:
    lines = metrics(separate)
    assert [line["step"] for line in lines] == [1, 2, 3] and set(lines[0]) >= KEYS
    assert [line["weight_version"] for line in lines] == [1, 2, 3]
    assert all(line["logprob_gap_max"] < 1e-4 for line in lines)  # fp32: generator and trainer agree
    assert any(line["grad_norm"] > 0 for line in lines) and any(line["reward_mean"] > 0 for line in lines)
    samples = [json.loads(line) for line in (separate / "samples.jsonl").read_text().splitlines()]
    assert {s["step"] for s in samples} == {1, 2, 3} and {"prompt", "completion", "reward"} <= set(samples[0])


def test_steps_take_as_many_prompts_as_they_need(separate: Path) -> None:
    """The untrained policy seldom has eight groups with a spread: most steps ask twice."""
    lines = metrics(separate)
    assert {line["rounds"] for line in lines} <= {1, 2} and lines[-1]["prompts"] == 8 * sum(m["rounds"] for m in lines)
    assert lines[1]["prompts"] > 2 * 8  # else going on from step 2 would not show that they are counted


def test_same_bits_twice_and_resumed_bit_for_bit(separate: Path, run: Callable, tmp_path: Path) -> None:
    twice, resumed = tmp_path / "twice", tmp_path / "resumed"
    shutil.copytree(separate / "checkpoints/step-00000002", resumed / "checkpoints/step-00000002")
    assert_good(run(3, {twice: SEPARATE, resumed: SEPARATE}), 2)
    assert numbers(twice) == numbers(separate)
    assert numbers(resumed) == numbers(separate)[2:]
    for file in (separate / "checkpoints/step-00000003").glob("*.safetensors"):
        for other in (twice, resumed):
            again = load_file(other / "checkpoints/step-00000003" / file.name)
            assert all(again[name].equal(tensor) for name, tensor in load_file(file).items())


def assert_close(run_dir: Path, separate: Path) -> None:
    """Same seeds, same tokens: only the order of sums differs."""
    for here, there in zip(numbers(run_dir), numbers(separate), strict=True):
        assert here == pytest.approx(there, rel=1e-4, abs=1e-6)  # Adam's first steps enlarge rounding


def test_colocated_does_the_same_and_the_gate_stops_it(separate: Path, run: Callable, tmp_path: Path) -> None:
    """On data-parallel and context-parallel ranks; then with a gap between generator and trainer that is too large."""
    data, context, wrong = (tmp_path / name for name in ("data", "context", "wrong"))
    result = run(2, {data: (), context: ("parallel.cp=2",), wrong: ("rollout.max_logprob_gap=1e-30",)})
    assert "exit codes [0, 0, 1]" in result.stdout and result.returncode != 0, result.stdout[-3000:]
    assert_close(data, separate)
    assert_close(context, separate)
    assert "generator and trainer differ" in result.stdout
    assert not (wrong / "checkpoints").exists()


def test_on_a_pipeline(separate: Path, run: Callable, tmp_path: Path) -> None:
    """Colocated, the same; then with a reference and replay: KL to the start is 0 at the first update and grows; text
    rows bring their own loss."""
    layout, plain, more = ("parallel.pp=2", "parallel.tp=2"), tmp_path / "plain", tmp_path / "more"
    extra = (
        "grpo.kl_coef=0.1",
        "data.replay_seqs=4",
        "grpo.minibatches=1",
        "train.seq_len=256",
        "rollout.temperature=0.9",
    )
    assert_good(run(4, {plain: layout, more: layout + extra}), 2)
    assert_close(plain, separate)
    lines = [line for line in metrics(more) if "kl" in line]
    assert lines[0]["kl"] == pytest.approx(0.0, abs=1e-9) and lines[-1]["kl"] > 1e-6
    assert all(5 < line["replay_loss"] < 7 for line in lines)  # about ln 512


@pytest.mark.slow
def test_other_forms_on_two_layouts(run: Callable, start: Path, tmp_path: Path) -> None:
    """A pipeline of tensor-parallel ranks, and context-parallel ones with data: the reference scores samples before
    their advantages, ratios are of whole answers, and old log-probs are the trainer's."""
    forms = (
        *("grpo.kl_coef=0.1", "grpo.kl_in=reward", "grpo.kl_form=k1", "grpo.normalize_std=false", "grpo.epochs=2"),
        *("grpo.objective=gspo", "grpo.mismatch=mask_seqs", "grpo.off_policy_delta=0.001", "grpo.overlong_buffer=4"),
    )
    pipeline, context = tmp_path / "pipeline", tmp_path / "context"
    layouts = {pipeline: ("parallel.pp=2", "parallel.tp=2"), context: ("parallel.cp=2", "engine.backend=fsdp")}
    assert_good(run(4, {place: (*layout, *forms) for place, layout in layouts.items()}), 2)
    assert_close(pipeline, context)
    for line in metrics(pipeline):
        assert line["mismatch_weight"] == pytest.approx(1.0, abs=1e-4)  # fp32: the same numbers
        assert line["mismatch_fraction"] <= 1 and line["reward/overlong"] < 0
    assert metrics(pipeline)[-1]["kl"] != 0


def test_signal_saves_and_stops_with_workers(start: Path, tmp_path: Path) -> None:
    """USR1 to every rank, as Slurm does: the trainers save, then let the worker go."""
    run_dir = tmp_path / "run"
    model = json.dumps({"init_from": str(start / "hf")})
    paths = (f"model={model}", f"data.train={start / 'problems.jsonl'}", f"run_dir={run_dir}")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3"]
    options = (*paths, *SETTINGS, *SEPARATE, "train.steps=1000", "checkpoint.every_steps=0")
    process = subprocess.Popen(
        [*launcher, "-m", "llmtrain", "grpo", str(start / "small.yaml"), *options],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    give_up = time.monotonic() + 90
    while not (run_dir / "metrics.jsonl").exists() or not metrics(run_dir):
        assert time.monotonic() < give_up and process.poll() is None, process.communicate(timeout=40)[0][-3000:]
        time.sleep(0.05)
    for worker in psutil.Process(process.pid).children():
        worker.send_signal(signal.SIGUSR1)
    output = process.communicate(timeout=60)[0]
    last = metrics(run_dir)[-1]["step"]
    assert f"stopped by a signal after step {last}" in output, output[-3000:]
    assert (run_dir / f"checkpoints/step-{last:08d}").exists()
    assert "exitcode  : 75" in output, output[-3000:]
