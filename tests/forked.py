"""Forks ranks for tests from one process that has imported torch, DeepSpeed and llmtrain: that takes longer than most
tests. Restarts, signals and the product's commands are tested with torchrun."""

from __future__ import annotations

import contextlib
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing import connection, get_context
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
from torch.distributed import TCPStore

GRACE_S = 20  # between SIGTERM and SIGKILL
CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["pytest", "torch", "torch._dynamo", "deepspeed", "llmtrain.engine.zero", "llmtrain.engine.fsdp"]
    + [f"llmtrain.recipes.{name}" for name in ("pretrain", "sft", "reward", "dpo", "grpo", "ppo")]
    + ["tests.freeze_gc"]
)


def run_forked(
    ranks: int, target: str | Path, *args: str | Path, timeout_s: float = 120, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs `target`, a module name or a path that ends in .py, on `ranks` local processes, with the environment and the
    arguments that torchrun would give it. `env` is added to the environment.

    Returns 0, or 1 as soon as one rank fails, and stdout and stderr of all together in `stdout`. Fails the test with
    the output so far when it takes longer than `timeout_s` seconds; no process is left behind.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environments = [{**_environment(rank, ranks, store.port), **(env or {})} for rank in range(ranks)]
    done = _run(environments, target, args, timeout_s)
    return subprocess.CompletedProcess(done.args, int(done.returncode != 0), done.stdout)


def run_alone(
    target: str | Path, *args: str | Path, timeout_s: float = 240, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs one process that no launcher started, like `run_forked`, and returns its own exit code. `env` is added to
    the environment."""
    return _run([{**os.environ, **(env or {})}], target, args, timeout_s)


def run_killed(ranks: int, target: str | Path, *args: str | Path, after_s: float) -> subprocess.CompletedProcess[str]:
    """Runs `target` like `run_forked`, or if there is one rank like `run_alone`. What has not ended `after_s` seconds
    after its start is killed by SIGKILL, with all processes of its group, and the return code is -SIGKILL."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environments = [_environment(rank, ranks, store.port) for rank in range(ranks)] if ranks > 1 else [os.environ]
    return _run(environments, target, args, after_s, kill=True)


def _run(
    environments: Sequence[Mapping[str, str]],
    target: str | Path,
    args: Sequence[str | Path],
    timeout_s: float,
    kill: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Starts a process for each environment, with `kill` each in a group of its own, which is killed when it is too
    late. Returns the exit code of one that failed, else 0."""
    argv = [str(target), *map(str, args)]
    with tempfile.NamedTemporaryFile("r", encoding="utf-8", errors="replace") as output:
        processes = [CONTEXT.Process(target=_rank, args=(argv, dict(e), output.name, kill)) for e in environments]
        try:
            for process in processes:
                process.start()
            in_time = _await(processes, time.monotonic() + timeout_s)
        finally:
            crashed = {p.exitcode for p in processes if p.exitcode is not None and p.exitcode < 0}
            _kill(processes) if kill else _end(processes)
        said = output.read() + (f"processes died of signals: {sorted(-code for code in crashed)}\n" if crashed else "")
    if kill and not in_time:
        return subprocess.CompletedProcess(argv, -signal.SIGKILL, stdout=said)
    if not in_time:
        pytest.fail(f"{target} in {len(environments)} processes did not end in {timeout_s} s:\n{said[-6000:]}")
    return subprocess.CompletedProcess(argv, next((p.exitcode for p in processes if p.exitcode), 0), stdout=said)


def _environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "GROUP_RANK": 0}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}  # the store is not rank 0's
    return {**os.environ, **{name: str(value) for name, value in numbers.items()}, **place, **agent}


def _rank(argv: list[str], environment: Mapping[str, str], output: str, own_group: bool) -> None:
    if own_group:
        os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = argv
    if argv[0].endswith(".py"):
        sys.path.insert(0, os.path.dirname(argv[0]))
        runpy.run_path(argv[0], run_name="__main__")
    else:
        runpy.run_module(argv[0], run_name="__main__")


def _await(processes: Sequence[ForkServerProcess], deadline: float) -> bool:
    """Waits until all have ended well or one has failed: True; False when it is too late."""
    while running := [p for p in processes if p.exitcode is None]:
        if any(p.exitcode for p in processes):
            return True
        if not connection.wait([p.sentinel for p in running], deadline - time.monotonic()):
            return False
    return True


def _kill(processes: Sequence[ForkServerProcess]) -> None:
    running = [p for p in processes if p.pid is not None and p.is_alive()]
    for process in running:
        with contextlib.suppress(ProcessLookupError):  # it has no group yet
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
    for process in running:
        process.join()


def _end(processes: Sequence[ForkServerProcess]) -> None:
    running = [p for p in processes if p.pid is not None and p.is_alive()]
    for process in running:
        process.terminate()
    deadline = time.monotonic() + GRACE_S
    for process in running:
        process.join(max(0.0, deadline - time.monotonic()))
        process.kill()
        process.join()
