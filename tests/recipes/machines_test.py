"""GRPO that samples ahead on two machines, which are two launches of torchrun on this one: each has a trainer and a
worker of its own."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from llmtrain.observe.metrics import read_lines
from tests.conftest import ROOT, stop
from tests.recipes.ahead_test import SETTINGS, STEPS, check_replay, write_problems
from tests.recipes.kills_test import save_model
from tests.small_run import DOCUMENT

LIMIT_S = 200


@pytest.fixture
def directory(small_data: Path, tmp_path: Path) -> Path:
    (tmp_path / "small.yaml").write_text(DOCUMENT.format(data=small_data))
    save_model(tmp_path, "start", small_data / "tokenizer", 0)
    write_problems(tmp_path)
    return tmp_path


def launch(machine: int, port: int, output: Path, *arguments: str) -> subprocess.Popen:
    """Starts torchrun on a machine; the first listens at the port."""
    place = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", f"--rdzv-conf=is_host={machine == 0}"]
    launcher = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", *place]
    with open(output, "w") as file:
        return subprocess.Popen(
            [sys.executable, *launcher, "--local-addr=127.0.0.1", "-m", "llmtrain", *arguments],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


@contextlib.contextmanager
def machines(directory: Path, name: str, *overrides: str) -> Iterator[list[subprocess.Popen]]:
    """Runs GRPO on two machines; at the end no process is left."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = (f"run_dir={directory / name}", f"data.train={directory}/problems.jsonl")
    start = (f"model.init_from={directory / 'start'}", f"data.held_out={directory}/problems.jsonl")
    arguments = ("grpo", f"{directory / 'small.yaml'}", *places, *start, *SETTINGS, *overrides)
    launched = [launch(m, port, directory / f"{name}-{m}.txt", *arguments) for m in range(2)]
    try:
        yield launched
    finally:
        for process in launched:
            if process.poll() is None:
                stop(process)


def said(directory: Path, name: str) -> list[str]:
    return [(directory / f"{name}-{machine}.txt").read_text() for machine in range(2)]


def run(directory: Path, name: str, *overrides: str) -> list[dict]:
    """Runs to the end; returns the metrics."""
    with machines(directory, name, *overrides) as launched:
        codes = [process.wait(LIMIT_S) for process in launched]
    assert codes == [0, 0], said(directory, name)
    return read_lines(str(directory / name / "metrics.jsonl"))


def worker_of(launched: subprocess.Popen) -> psutil.Process | None:
    """The worker of a machine, once it has computed for a second and a half: it starts, or samples."""
    for process in psutil.Process(launched.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "llmtrain.rollout.worker_process" in process.cmdline() and process.cpu_times().user > 1.5:
                return process
    return None


def kill_worker(launched: subprocess.Popen) -> int:
    give_up = time.monotonic() + LIMIT_S
    while (worker := worker_of(launched)) is None:
        assert time.monotonic() < give_up
        time.sleep(0.1)
    worker.kill()
    return worker.pid


@pytest.mark.slow
def test_both_machines_sample_a_killed_worker_starts_again_and_the_record_replays(directory: Path) -> None:
    killed: list[int] = []
    with machines(directory, "recorded", "rollout.record=true") as launched:
        killer = threading.Thread(target=lambda: killed.append(kill_worker(launched[1])))
        killer.start()
        codes = [process.wait(LIMIT_S) for process in launched]
        killer.join()
    first, second = said(directory, "recorded")
    assert codes == [0, 0] and len(killed) == 1, first + second
    assert re.search(r"rollout worker 1: (?s:.)*ended by SIGKILL(?s:.)*it starts again, 3 left", second)
    assert "rollout worker" not in first  # which has lost none
    lines = read_lines(str(directory / "recorded" / "metrics.jsonl"))
    assert [line["step"] for line in lines] == list(range(STEPS + 1))
    assert all(0 <= line["staleness_max"] <= 2 and line["workers"] == 2 for line in lines[1:])
    assert max(line["staleness_max"] for line in lines[1:]) > 0
    assert {path.name for path in (directory / "recorded").glob("rollout-worker-*.log")} == {
        "rollout-worker-0.log",
        "rollout-worker-1.log",
    }
    again = run(directory, "replayed", f"rollout.replay={directory}/recorded/rollouts")
    check_replay(directory, lines, again)
