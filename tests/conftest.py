"""Provides what every test shares: a quiet, offline, single-threaded environment, `torchrun` and `forked` for tests on
several ranks, and `disk_calls` for tests of what survives a power cut."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil
import pytest
import torch

from tests.forked import run_forked
from tests.small_run import small, small_data  # noqa: F401  fixtures

ROOT = Path(__file__).resolve().parent.parent
TERM_GRACE_S = 40  # torchrun itself gives its workers 30 s between SIGTERM and SIGKILL

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
os.environ.update(WANDB_MODE="offline", WANDB_SILENT="true")
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # every process of a test would compile llmtrain anew, half a second
if not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"
# DeepSpeed's op builder leaves a lock file when it is killed, and the next user of that directory waits on it forever.
os.environ["TORCH_EXTENSIONS_DIR"] = tempfile.mkdtemp(prefix="llmtrain-extensions-")
# A compilation killed while it links leaves an empty library in the cache, which every later run fails on.
os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(os.environ["TORCH_EXTENSIONS_DIR"], "inductor")
torch.set_num_threads(1)

Torchrun = Callable[..., subprocess.CompletedProcess[str]]


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["TORCH_EXTENSIONS_DIR"], ignore_errors=True)


def stop(process: subprocess.Popen[str]) -> None:
    """Sends SIGTERM to the process group, then SIGKILL to what is left. The workers of torchrun lead sessions of their
    own, so the group alone does not reach them: they are listed first, by id."""
    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    os.killpg(process.pid, signal.SIGTERM)
    for survivor in psutil.wait_procs(tree, timeout=TERM_GRACE_S)[1]:
        survivor.kill()


def run_torchrun(
    ranks: int, target: str | Path, *args: str | Path, timeout_s: float = 120, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs `torchrun --standalone` of `target`, a module name or a path that ends in .py, on `ranks` local processes.

    Returns the exit code, and stdout and stderr together in `stdout`. `env` is added to the environment. Fails the test
    with the output so far when it takes longer than `timeout_s` seconds; no process is left behind.
    """
    name = [str(target)] if str(target).endswith(".py") else ["-m", str(target)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(
            [*launcher, *name, *map(str, args)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | dict(env or {}),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            stop(process)
            output.seek(0)
            pytest.fail(f"torchrun {target} on {ranks} ranks did not end in {timeout_s} s:\n{output.read()[-6000:]}")
        except BaseException:  # an interrupt, or pytest-timeout's own failure
            stop(process)
            raise
        output.seek(0)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout=output.read())


@pytest.fixture
def torchrun() -> Torchrun:
    """Provides `torchrun(ranks, module_or_script, *args, timeout_s=120, env=None)`: see `run_torchrun`."""
    return run_torchrun


@pytest.fixture
def forked() -> Torchrun:
    """Provides `forked(ranks, module_or_script, *args, timeout_s=120, env=None)`: see `run_forked`."""
    return run_forked


@pytest.fixture
def disk_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, bytes | str | None]]:
    """Records, in their order, `("fsync", path, bytes of the file at that moment)`, with None for a directory, and
    `("rename", old path, new path)`, which stands for `os.replace` too."""
    calls: list[tuple[str, str, bytes | str | None]] = []
    sync, moves = os.fsync, {name: getattr(os, name) for name in ("rename", "replace")}

    def fsync(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        calls.append(("fsync", path, None if os.path.isdir(path) else Path(path).read_bytes()))
        sync(descriptor)

    def moving(name: str) -> Callable[[str, str], None]:
        return lambda old, new: calls.append(("rename", str(old), str(new))) or moves[name](old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    for name in moves:
        monkeypatch.setattr(os, name, moving(name))
    return calls
