"""Forked ranks: output and failure come back, and nothing survives a time-out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.forked import run_alone

SAYS = "import os, sys\nsys.stdout.write(f\"rank {os.environ['RANK']} {sys.argv[1]}\\n\")\nsys.stdout.flush()\n"
RANK_1_FAILS = f"{SAYS}import time\nif os.environ['RANK'] == '1':\n    sys.exit('broken on purpose')\ntime.sleep(600)\n"
HANGS = f"{SAYS}import time\nprint('pid', os.getpid(), flush=True)\ntime.sleep(600)\n"


def test_output_and_success_come_back(forked: Callable, tmp_path: Path) -> None:
    (tmp_path / "says.py").write_text(SAYS)
    done = forked(2, tmp_path / "says.py", "a=1", timeout_s=60)
    assert done.returncode == 0 and sorted(done.stdout.splitlines()) == ["rank 0 a=1", "rank 1 a=1"]


def test_what_the_server_imported_is_frozen(tmp_path: Path) -> None:
    """The server passes in silence over a module that it does not find."""
    (tmp_path / "counts.py").write_text("import gc, sys\nsys.exit(7 if gc.get_freeze_count() > 100_000 else 1)\n")
    assert run_alone(tmp_path / "counts.py", timeout_s=60).returncode == 7


def test_one_failure_ends_all(forked: Callable, tmp_path: Path) -> None:
    (tmp_path / "fails.py").write_text(RANK_1_FAILS)
    done = forked(2, tmp_path / "fails.py", "a=1", timeout_s=60)
    assert done.returncode == 1 and "broken on purpose" in done.stdout


def test_a_timeout_fails_the_test_and_leaves_no_rank(forked: Callable, tmp_path: Path) -> None:
    (tmp_path / "hangs.py").write_text(HANGS)
    forked(1, "this", timeout_s=60)  # starts the server, whose imports take longer than the limit below
    with pytest.raises(pytest.fail.Exception, match="did not end in 3 s") as failure:
        forked(2, tmp_path / "hangs.py", "a=1", timeout_s=3)
    pids = [int(line.split()[1]) for line in str(failure.value).splitlines() if line.startswith("pid ")]
    assert len(pids) == 2 and not any(psutil.pid_exists(pid) for pid in pids)
