"""Pretraining as a user runs it: killed, resumed, on other layouts, with bad numbers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llmtrain.checkpoint.load import CheckpointReader
from tests.conftest import ROOT
from tests.forked import run_alone, run_forked
from tests.small_run import DOCUMENT

SEVERAL = Path(__file__).parents[1] / "several_runs.py"
FAULTS = Path(__file__).parents[1] / "trainer" / "faults_worker.py"
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


@pytest.fixture(scope="module")
def straight(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of 6 steps on pp=2 x tp=2, checkpoints at 3 and 6."""
    base = tmp_path_factory.mktemp("straight")
    (base / "small.yaml").write_text(DOCUMENT.format(data=small_data))
    result = run_forked(4, "llmtrain", "pretrain", base / "small.yaml", f"run_dir={base / 'run'}", *LAYOUT)
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


def several(ranks: int, config: Path, runs: dict[Path, tuple[str, ...]]) -> subprocess.CompletedProcess[str]:
    """`llmtrain pretrain` with each run directory and its overrides, by the same ranks."""
    arguments = [["pretrain", str(config), f"run_dir={run_dir}", *overrides] for run_dir, overrides in runs.items()]
    return run_forked(ranks, SEVERAL, json.dumps(arguments), timeout_s=240)


@pytest.fixture(scope="module")
def again(straight: Path) -> tuple[Path, str]:
    """Directory and output of three more runs like `straight`: `killed` goes on from step 3 after a kill of rank 2 in
    step 5; `twice` is new; `flipped` has the checkpoints of `straight`, with another bit in the newest."""
    base, config = straight.parent, straight.parent / "small.yaml"
    accident = [{"attempt": 0, "rank": 2, "at": "step", "count": 5}]
    arguments = ("pretrain", config, f"run_dir={base / 'killed'}", *LAYOUT)
    done = run_forked(4, FAULTS, *arguments, env={"ACCIDENTS": json.dumps(accident)})
    assert done.returncode != 0 and f"accident {accident[0]}" in done.stdout, done.stdout[-3000:]
    assert [line["step"] for line in metrics(base / "killed")] == [1, 2, 3, 4]

    shutil.copytree(straight / "checkpoints", base / "flipped/checkpoints")
    broken = next((base / "flipped/checkpoints/step-00000006").glob("rank-*.safetensors"))
    data = bytearray(broken.read_bytes())
    data[len(data) // 2] ^= 1
    broken.write_bytes(data)
    result = several(4, config, {base / name: LAYOUT for name in ("killed", "twice", "flipped")})
    assert "exit codes [0, 0, 0]" in result.stdout, result.stdout[-3000:]
    return base, result.stdout


@pytest.mark.timeout(500)
def test_killed_run_goes_on_bit_for_bit(straight: Path, again: tuple[Path, str]) -> None:
    run_dir = again[0] / "killed"
    assert f"resumed {run_dir}/checkpoints/step-00000003" in again[1]
    assert losses(run_dir) == losses(straight)
    assert [line["step"] for line in metrics(run_dir)] == [1, 2, 3, 4, 5, 6]
    assert_same_weights(run_dir / "checkpoints/step-00000006", straight / "checkpoints/step-00000006")


def test_same_bits_twice(straight: Path, again: tuple[Path, str]) -> None:
    assert losses(again[0] / "twice") == losses(straight)
    assert_same_weights(again[0] / "twice/checkpoints/step-00000006", straight / "checkpoints/step-00000006")


def test_flipped_byte_falls_back(straight: Path, again: tuple[Path, str]) -> None:
    assert "step-00000006/rank-0000" in again[1] and "flipped/checkpoints/step-00000003" in again[1]
    assert losses(again[0] / "flipped") == losses(straight)[3:]


@pytest.mark.timeout(500)
def test_other_layouts_go_on_equally_and_nan_stops_before_the_update(straight: Path, tmp_path: Path) -> None:
    """From the checkpoint at step 3, written by pp=2 x tp=2 ZeRO-1: the next losses are the same but for rounding. Then
    an absurd learning rate: the gradient overflows, the run names the step, no checkpoint holds the damage."""
    config, nan = straight.parent / "small.yaml", tmp_path / "nan"
    names = ("one", "three", "tensor")
    for name in names:
        shutil.copytree(straight / "checkpoints/step-00000003", tmp_path / name / "checkpoints/step-00000003")
    done = run_alone("llmtrain", "pretrain", config, f"run_dir={tmp_path / 'one'}", "engine.zero_stage=0")
    assert done.returncode == 0, done.stdout[-3000:]
    absurd = ("optim.lr=1e30", "optim.warmup_steps=0", "optim.grad_clip=0", "checkpoint.every_steps=0")
    runs = {
        tmp_path / "three": ("engine.zero_stage=3",),
        tmp_path / "tensor": ("parallel.tp=2", "engine.zero_stage=2"),
        nan: absurd,
    }
    result = several(2, config, runs)
    assert "exit codes [0, 0, 1]" in result.stdout and result.returncode != 0, result.stdout[-20000:]
    for name in names:
        found = losses(tmp_path / name)
        assert found == pytest.approx(losses(straight)[3:], rel=1e-5), name  # fp32, other order of sums
    assert "step 2: the gradient is not finite, a sum over ranks, though" in result.stdout, result.stdout[-700:]
    assert not (nan / "checkpoints").exists() and len(metrics(nan)) == 1


@pytest.mark.timeout(420)
def test_tiny_stands_alone_stops_at_a_signal_and_goes_on(tmp_path: Path) -> None:
    """The document as it is: it makes its own data. One process is told to stop in step 12 (as Slurm does), saves, and
    ends with 75; two ranks go on from there."""
    run_dir, config = tmp_path / "run", ROOT / "configs/pretrain/tiny.yaml"
    accident = [{"attempt": 0, "rank": 0, "at": "step", "count": 12, "signal": "SIGUSR1"}]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "ACCIDENTS": json.dumps(accident)}
    command = [sys.executable, FAULTS, "pretrain", config, f"run_dir={run_dir}"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 75 and "the same command goes on" in done.stderr, done.stderr[-3000:]
    assert (run_dir / "checkpoints/step-00000012").exists() and len(metrics(run_dir)) == 12
    result = run_forked(2, "llmtrain", "pretrain", config, f"run_dir={run_dir}", timeout_s=200)
    assert result.returncode == 0 and "step-00000012" in result.stdout, result.stdout[-3000:]
    assert [line["step"] for line in metrics(run_dir)] == list(range(1, 21))
    assert losses(run_dir)[-1] < losses(run_dir)[0] - 0.5
