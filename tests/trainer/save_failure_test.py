"""Saves that fail or are in flight when a run ends, with real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from llmtrain.checkpoint.manifest import newest_intact, verify
from tests.conftest import ROOT

TOO_FEW_BYTES = 100_000  # a rank's fragments take about 250 kB


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def limited(tmp_path: Path) -> Path:
    """`llmtrain` whose rank 1 cannot write files of more than LIMIT bytes."""
    script = tmp_path / "limited.py"
    script.write_text(
        "import os, resource, sys\n"
        "from llmtrain.cli import entry\n"
        "if os.environ['RANK'] == '1':\n"
        f"    resource.setrlimit(resource.RLIMIT_FSIZE, ({TOO_FEW_BYTES}, {TOO_FEW_BYTES}))\n"
        "entry()\n"
    )
    return script


def test_a_failing_disk_is_warned_of_and_the_last_save_not_forgiven(
    small: Path, tmp_path: Path, forked: Callable
) -> None:
    run_dir = tmp_path / "run"
    options = ("checkpoint.background=true", "train.eval_seqs=1")
    result = forked(2, limited(tmp_path), "pretrain", small, f"run_dir={run_dir}", *options)
    assert [line["step"] for line in metrics(run_dir)] == [1, 2, 3, 4, 5, 6]
    assert result.stdout.count("step 3 was not saved: rank 1: ") == 1, result.stdout[-3000:]
    assert result.stdout.count("the run goes on") == 1  # not at step 6, the last
    assert "File too large" in result.stdout and "rank-00001.safetensors" in result.stdout
    assert result.returncode != 0 and 'Traceback (most recent call last):\n  File "/' not in result.stdout
    assert os.listdir(run_dir / "checkpoints") == []


def filled(tmp_path: Path) -> Path:
    """`llmtrain` that cannot make a file longer than 6,000 bytes, metrics.jsonl neither, until step 40 is saved."""
    script = tmp_path / "filled.py"
    script.write_text(
        "from resource import RLIMIT_FSIZE, getrlimit, setrlimit\n"
        "from llmtrain.cli import entry\n"
        "from llmtrain.trainer import loop\n"
        "most, save = getrlimit(RLIMIT_FSIZE)[1], loop.save\n"
        "def with_room(job, last):\n"
        "    setrlimit(RLIMIT_FSIZE, (most if job.step == 40 else 6000, most))\n"
        "    save(job, last)\n"
        "loop.save = with_room\n"
        "entry()\n"
    )
    return script


def test_a_full_disk_then_room_leaves_no_gap(small: Path, tmp_path: Path) -> None:
    """Neither saves nor lines fit for a while; in the end every step stands in metrics.jsonl once."""
    run_dir = tmp_path / "run"
    options = ("train.steps=40", "checkpoint.every_steps=10", "train.eval_seqs=1", "train.global_batch_seqs=2")
    command = [sys.executable, str(filled(tmp_path)), "pretrain", str(small), f"run_dir={run_dir}", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, timeout=200)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stderr.count("metrics.jsonl: File too large; its lines wait in memory") == 1
    assert [f"step {step} was not saved" in result.stderr for step in (10, 20, 30, 40)] == [True, True, True, False]
    assert [line["step"] for line in metrics(run_dir)] == list(range(1, 41))
    assert os.listdir(run_dir / "checkpoints") == ["step-00000040"]


def test_stop_means_stop(small: Path, tmp_path: Path, forked: Callable) -> None:
    run_dir = tmp_path / "run"
    options = ("checkpoint.background=true", "checkpoint.on_error=stop", "checkpoint.every_steps=1", "train.steps=200")
    result = forked(2, limited(tmp_path), "pretrain", small, f"run_dir={run_dir}", *options)
    assert result.returncode != 0 and "File too large" in result.stdout, result.stdout[-3000:]
    assert len(metrics(run_dir)) <= 2  # at the latest the next save waits for the first


def test_a_signal_waits_for_the_save_in_flight(small: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    options = ("train.steps=10000", "checkpoint.background=true", "checkpoint.every_steps=1", "checkpoint.keep=100")
    command = [sys.executable, "-m", "llmtrain", "pretrain", str(small), f"run_dir={run_dir}", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    give_up = time.monotonic() + 100
    while not (run_dir / "metrics.jsonl").exists() or len(metrics(run_dir)) < 3:
        assert time.monotonic() < give_up and process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 75, errors[-2000:]
    steps = [line["step"] for line in metrics(run_dir)]
    saved = sorted(os.listdir(run_dir / "checkpoints"))
    assert saved == [f"step-{step:08d}" for step in steps][-100:]
    assert newest_intact(str(run_dir / "checkpoints")).endswith(saved[-1])
    for name in saved[:3]:
        verify(str(run_dir / "checkpoints" / name))
