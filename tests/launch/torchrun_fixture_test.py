"""The fixture that starts torchrun: output and exit code come back, and nothing survives a time-out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

RANK_1_FAILS = """
import os, pathlib, sys, time
sys.stdout.write(f"rank {os.environ['RANK']} {sys.argv[2]}\\n")  # one write: the ranks have no buffer and one file
sys.stdout.flush()
if os.environ["RANK"] == "0":
    sys.exit(pathlib.Path(sys.argv[1]).touch())
while not os.path.exists(sys.argv[1]):  # torchrun ends rank 0 as soon as rank 1 fails
    time.sleep(0.05)
sys.exit("broken on purpose")
"""


def test_output_and_exit_code_come_back(torchrun: Callable, tmp_path: Path) -> None:
    (tmp_path / "ranks.py").write_text(RANK_1_FAILS)
    done = torchrun(2, tmp_path / "ranks.py", tmp_path / "printed", "a=1", timeout_s=60)
    assert done.returncode == 1
    assert "rank 0 a=1" in done.stdout and "rank 1 a=1" in done.stdout and "broken on purpose" in done.stdout


def processes_of(script: Path) -> list[psutil.Process]:
    """Launcher and workers that run the script."""
    return [p for p in psutil.process_iter(["cmdline"]) if str(script) in (p.info["cmdline"] or ())]


def test_a_timeout_fails_the_test_and_leaves_no_worker(torchrun: Callable, tmp_path: Path) -> None:
    """However slow the machine: the limit is short until both workers are seen."""
    script = tmp_path / "hangs.py"
    script.write_text("import time\nprint('hangs', flush=True)\ntime.sleep(600)\n")
    for limit_s in (8, 16, 64):
        with pytest.raises(pytest.fail.Exception, match=f"did not end in {limit_s} s") as failure:
            torchrun(2, script, timeout_s=limit_s)
        assert processes_of(script) == []
        if str(failure.value).count("hangs\n") == 2:
            return
    pytest.fail("no limit was long enough for both workers to start")
