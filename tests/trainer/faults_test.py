"""Accidents to real runs under torchrun: killed, stopped, told to end, and a bit of memory flipped."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from llmtrain.checkpoint.load import CheckpointReader
from llmtrain.observe.metrics import read_lines
from tests.conftest import ROOT, run_torchrun, stop
from tests.forked import run_forked
from tests.small_run import DOCUMENT

WORKER = Path(__file__).parent / "faults_worker.py"
TORCHRUN = ("-m", "torch.distributed.run")
SHORT_GRACE = (str(Path(__file__).parent / "short_grace.py"),)
LAYOUT = ("parallel.pp=2",)
TIMING = ("tokens_per_s", "step_s", "peak_bytes")
POINTS = {"batch": 10, "write": 4, "publish": 2, "prune": 2, "log": 5, "step": 5, "random": 500}  # largest counts


def command(
    config: Path, run_dir: Path, *overrides: str, restarts: int = 0, launcher: tuple[str, ...] = TORCHRUN
) -> list[str | Path]:
    """Under torchrun."""
    launched = (*launcher, "--standalone", "--nproc_per_node", "2", "--max-restarts", str(restarts), WORKER)
    return [sys.executable, *launched, "pretrain", config, f"run_dir={run_dir}", *overrides]


def start(arguments: list[str | Path], output: Path, accidents: list[dict]) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "ACCIDENTS": json.dumps(accidents)}
    with open(output, "w") as file:
        return subprocess.Popen(arguments, cwd=ROOT, env=env, stdout=file, stderr=file, start_new_session=True)


def finish(process: subprocess.Popen, output: Path, timeout_s: float) -> str:
    """What it printed. No process is left behind."""
    try:
        process.wait(timeout_s)
    except BaseException:
        stop(process)
        raise
    return output.read_text()


def wait_for(text: str, output: Path, process: subprocess.Popen, timeout_s: float = 90) -> None:
    give_up = time.monotonic() + timeout_s
    while text not in output.read_text():
        if time.monotonic() > give_up or process.poll() is not None:
            stop(process) if process.poll() is None else None
            pytest.fail(f"no {text!r} in:\n{output.read_text()[-3000:]}")
        time.sleep(0.05)


def recorded(run_dir: Path) -> list[dict]:
    """All that was measured, but for the clock."""
    lines = [line for name in ("metrics.jsonl", "evaluations.jsonl") for line in read_lines(str(run_dir / name))]
    return [{key: value for key, value in line.items() if key not in TIMING} for line in lines]


def assert_equal_runs(one: Path, two: Path, last: str = "step-00000006") -> None:
    assert recorded(one) == recorded(two)
    a, b = (CheckpointReader(str(run / "checkpoints" / last)) for run in (one, two))
    for name in a.names():
        for key in ("weight", "exp_avg", "exp_avg_sq"):
            assert a.full(name, key).equal(b.full(name, key)), (name, key)


@pytest.fixture(scope="module")
def config(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("faults") / "small.yaml"
    path.write_text(DOCUMENT.format(data=small_data))
    return path


@pytest.fixture(scope="module")
def undisturbed(config: Path) -> Path:
    result = run_forked(2, "llmtrain", "pretrain", config, f"run_dir={config.parent / 'run'}", *LAYOUT)
    assert result.returncode == 0, result.stdout[-3000:]
    return config.parent / "run"


def test_told_to_end_and_killed_the_run_is_the_same(config: Path, undisturbed: Path, tmp_path: Path) -> None:
    """torchrun gets SIGTERM while rank 1 is inside a long step 2; started again, rank 0 is killed at the rename of step
    6's checkpoint and torchrun restarts. Metrics and weights are those of the undisturbed run, bit for bit."""
    run_dir, output = tmp_path / "run", tmp_path / "output"
    long_step = [{"attempt": 0, "rank": 1, "at": "step", "count": 2, "sleep": 5}]
    process = start(command(config, run_dir, *LAYOUT), output, long_step)
    wait_for("accident", output, process)
    told = time.monotonic()
    process.send_signal(signal.SIGTERM)
    said = finish(process, output, 40)
    assert process.returncode != 0 and time.monotonic() - told < 30
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-00000002"], said[-3000:]
    assert "stopped by a signal after step 2" in said

    killed = [{"attempt": 0, "rank": 0, "at": "publish", "count": 2}]
    process = start(command(config, run_dir, *LAYOUT, restarts=1), output, killed)
    said = finish(process, output, 150)
    assert process.returncode == 0 and "step-00000003" in said, said[-3000:]
    assert "(exitcode: -9) local_rank: 0 " in said, said[-3000:]  # the launcher names the rank that died
    assert_equal_runs(run_dir, undisturbed)


def test_a_stopped_rank_is_named(config: Path, tmp_path: Path) -> None:
    """SIGSTOP to rank 1: who, in which step and collective the other waits; everything ends, with a failure."""
    output, accident = tmp_path / "output", {"attempt": 0, "rank": 1, "at": "step", "count": 2, "signal": "SIGSTOP"}
    arguments = command(config, tmp_path / "run", "engine.timeout_s=20", launcher=SHORT_GRACE)
    process = start(arguments, output, [accident])
    wait_for("accident", output, process)
    stopped = time.monotonic()
    place = "Rank 0 is in step 2, in all_reduce (llmtrain."
    wait_for(place, output, process, timeout_s=40)
    line = next(line for line in output.read_text().splitlines() if place in line)
    assert line.startswith("rank 1 (") and "no sign of life" in line, line
    said = finish(process, output, 90)
    assert process.returncode != 0 and time.monotonic() - stopped < 90
    assert "Timed out waiting 20000ms" in said


def test_a_flipped_bit_ends_the_run(config: Path, tmp_path: Path, torchrun: Callable) -> None:
    """Before step 4, on rank 1 of 3: the majority names it, and the damage is in no checkpoint and in no gradient."""
    accident = {"attempt": 0, "rank": 1, "at": "step", "count": 4, "flip": True}
    overrides = ("train.global_batch_seqs=6", "guard.replica_check_steps=2", "checkpoint.every_steps=1")
    arguments = ("pretrain", config, f"run_dir={tmp_path / 'run'}", *overrides)
    result = torchrun(3, WORKER, *arguments, env={"ACCIDENTS": json.dumps([accident])})
    assert result.returncode != 0
    found = "step 4: rank 1 ("
    assert found in result.stdout and "other bits of layers.1.attention_norm.weight than most of its 3" in result.stdout
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())[-1] == "step-00000003"
    assert len(read_lines(str(tmp_path / "run/metrics.jsonl"))) == 3


@pytest.mark.slow
def test_ranks_whose_launcher_dies_save_and_end(config: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    process = start(command(config, tmp_path / "run", "train.steps=100000"), output, [])
    wait_for("rank role", output, process)
    while not (tmp_path / "run/metrics.jsonl").exists() or not read_lines(str(tmp_path / "run/metrics.jsonl")):
        assert process.poll() is None
        time.sleep(0.1)
    ranks = psutil.Process(process.pid).children()
    process.kill()
    gone, alive = psutil.wait_procs(ranks, timeout=30)
    for rank in alive:
        rank.kill()
    assert len(gone) == 2 and not alive
    last = read_lines(str(tmp_path / "run/metrics.jsonl"))[-1]["step"]
    assert (tmp_path / f"run/checkpoints/step-{last:08d}").exists()


def accidents(seed: int, count: int) -> Iterator[dict]:
    """One in each attempt: any rank at any point."""
    draw = random.Random(seed)
    for attempt in range(count):
        point = draw.choice(list(POINTS))
        rank = 0 if point in ("publish", "prune", "log") else draw.randrange(2)
        yield {"attempt": attempt, "rank": rank, "at": point, "count": draw.randint(1, POINTS[point])}


@pytest.fixture(scope="module")
def long_run(config: Path) -> Path:
    """60 steps on two data-parallel ranks, a checkpoint at every third."""
    result = run_torchrun(2, "llmtrain", "pretrain", config, f"run_dir={config.parent / 'long'}", "train.steps=60")
    assert result.returncode == 0, result.stdout[-3000:]
    return config.parent / "long"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(5))
def test_ten_kills_leave_no_trace(config: Path, long_run: Path, tmp_path: Path, seed: int) -> None:
    """Ten attempts that are killed somewhere, then one that is not."""
    planned = list(accidents(seed, 10))
    output = tmp_path / "output"
    process = start(command(config, tmp_path / "run", "train.steps=60", restarts=10), output, planned)
    said = finish(process, output, 3000)
    assert process.returncode == 0, said[-3000:]
    assert said.count("accident {") == 10, said[-3000:]
    assert_equal_runs(tmp_path / "run", long_run, "step-00000060")
