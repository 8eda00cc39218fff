"""Pretraining as a user runs it: killed, resumed, on other layouts, with bad numbers."""

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

from llmtrain.checkpoint.load import CheckpointReader

LAYOUT = ("parallel.pp=2", "parallel.tp=2")


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in metrics(run_dir)]


def assert_same_weights(a: Path, b: Path) -> None:
    """Bit for bit, with the optimizer's state."""
    one, two = CheckpointReader(str(a)), CheckpointReader(str(b))
    assert one.names() == two.names()
    for name in one.names():
        for key in ("weight", "exp_avg", "exp_avg_sq"):
            assert one.full(name, key).equal(two.full(name, key)), (name, key)


def start_and_kill(config: Path, run_dir: Path, after_step: int, victim: int) -> str:
    """Start on 4 ranks, kill -9 rank `victim` once `after_step` steps are logged; returns the output."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "4"]
    process = subprocess.Popen(
        [*launcher, "-m", "llmtrain", "pretrain", str(config), f"run_dir={run_dir}", *LAYOUT],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    give_up = time.monotonic() + 90
    while not (run_dir / "metrics.jsonl").exists() or len(metrics(run_dir)) < after_step:
        assert time.monotonic() < give_up and process.poll() is None, process.communicate(timeout=40)[0][-3000:]
        time.sleep(0.01)
    workers = [p for p in psutil.Process(process.pid).children() if p.environ().get("RANK") == str(victim)]
    workers[0].kill()
    return process.communicate(timeout=60)[0]


@pytest.fixture(scope="module")
def straight(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of 6 steps on pp=2 x tp=2, checkpoints at 3 and 6."""
    from tests.conftest import run_torchrun
    from tests.trainer.conftest import DOCUMENT

    base = tmp_path_factory.mktemp("straight")
    (base / "small.yaml").write_text(DOCUMENT.format(data=small_data))
    result = run_torchrun(4, "llmtrain", "pretrain", base / "small.yaml", f"run_dir={base / 'run'}", *LAYOUT)
    assert result.returncode == 0, result.stdout[-3000:]
    return base / "run"


def test_learns_and_records(straight: Path) -> None:
    lines = metrics(straight)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1
    assert lines[-1]["tokens"] == 6 * 8 * 64
    wanted = {"step", "loss", "grad_norm", "lr", "tokens", "tokens_per_s", "step_s", "peak_bytes"}
    assert wanted <= set(lines[0])
    held_out = [json.loads(line) for line in (straight / "evaluations.jsonl").read_text().splitlines()]
    assert [e["step"] for e in held_out] == [0, 6] and held_out[1]["loss"] < held_out[0]["loss"] - 0.1
    assert (straight / "config.yaml").exists()


def test_killed_run_goes_on_bit_for_bit(small: Path, straight: Path, tmp_path: Path, torchrun: Callable) -> None:
    run_dir = tmp_path / "run"
    output = start_and_kill(small, run_dir, after_step=4, victim=2)
    assert "rank      : 2" in output and "Signal 9" in output, output[-2000:]
    result = torchrun(4, "llmtrain", "pretrain", small, f"run_dir={run_dir}", *LAYOUT)
    assert result.returncode == 0 and "resumed" in result.stdout, result.stdout[-3000:]
    assert losses(run_dir) == losses(straight)
    assert [line["step"] for line in metrics(run_dir)] == [1, 2, 3, 4, 5, 6]
    assert_same_weights(run_dir / "checkpoints/step-00000006", straight / "checkpoints/step-00000006")


def test_same_bits_twice(small: Path, straight: Path, tmp_path: Path, torchrun: Callable) -> None:
    result = torchrun(4, "llmtrain", "pretrain", small, f"run_dir={tmp_path / 'run'}", *LAYOUT)
    assert result.returncode == 0, result.stdout[-3000:]
    assert losses(tmp_path / "run") == losses(straight)


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (1, ("engine.zero_stage=0",)),
        (2, ("engine.zero_stage=3",)),
        (2, ("parallel.tp=2", "engine.zero_stage=2")),
    ],
)
def test_other_layouts_go_on_equally(
    ranks: int, layout: tuple[str, ...], small: Path, straight: Path, tmp_path: Path, torchrun: Callable
) -> None:
    """From the checkpoint at step 3, written by pp=2 x tp=2 ZeRO-1: the next losses are the same but for rounding."""
    shutil.copytree(straight / "checkpoints/step-00000003", tmp_path / "run/checkpoints/step-00000003")
    result = torchrun(ranks, "llmtrain", "pretrain", small, f"run_dir={tmp_path / 'run'}", *layout)
    assert result.returncode == 0, result.stdout[-3000:]
    assert losses(tmp_path / "run") == pytest.approx(losses(straight)[3:], rel=1e-5)  # fp32, other order of sums


def test_signal_saves_and_stops(small: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "llmtrain", "pretrain", str(small), f"run_dir={run_dir}", "train.steps=10000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    give_up = time.monotonic() + 60
    while not (run_dir / "metrics.jsonl").exists() or not metrics(run_dir):
        assert time.monotonic() < give_up and process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGUSR1)
    errors = process.communicate(timeout=30)[1]
    assert process.returncode == 75, errors[-2000:]
    last = metrics(run_dir)[-1]["step"]
    assert (run_dir / f"checkpoints/step-{last:08d}").exists()
    assert "the same command goes on" in errors


def test_flipped_byte_falls_back(small: Path, straight: Path, tmp_path: Path, torchrun: Callable) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(straight / "checkpoints", run_dir / "checkpoints")
    broken = next((run_dir / "checkpoints/step-00000006").glob("rank-*.safetensors"))
    data = bytearray(broken.read_bytes())
    data[len(data) // 2] ^= 1
    broken.write_bytes(data)
    result = torchrun(4, "llmtrain", "pretrain", small, f"run_dir={run_dir}", *LAYOUT)
    assert result.returncode == 0, result.stdout[-3000:]
    assert broken.name in result.stdout and "step-00000003" in result.stdout
    assert losses(run_dir) == losses(straight)[3:]


def test_nan_stops_before_the_update(small: Path, tmp_path: Path, torchrun: Callable) -> None:
    """An absurd learning rate: the loss overflows, the run names step and rank, no checkpoint holds the damage."""
    run_dir = tmp_path / "run"
    absurd = ("optim.lr=1e30", "optim.warmup_steps=0", "optim.grad_clip=0", "checkpoint.every_steps=0")
    result = torchrun(2, "llmtrain", "pretrain", small, f"run_dir={run_dir}", *absurd)
    assert result.returncode != 0
    assert "is not finite on rank(s) 0, 1" in result.stdout and "step 2" in result.stdout, result.stdout[-2000:]
    assert not (run_dir / "checkpoints").exists() and len(metrics(run_dir)) == 1
