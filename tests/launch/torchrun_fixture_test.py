"""The fixture that starts torchrun: output and exit code come back, and nothing survives a time-out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil
import pytest


def test_output_and_exit_code_come_back(torchrun: Callable, tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(
        "import os, sys\nprint('rank', os.environ['RANK'], *sys.argv[1:])\nsys.exit('broken on purpose')\n"
    )
    done = torchrun(2, script, "a=1", timeout_s=60)
    assert done.returncode == 1
    assert "rank 0 a=1" in done.stdout and "rank 1 a=1" in done.stdout and "broken on purpose" in done.stdout


def test_a_timeout_fails_the_test_and_leaves_no_worker(torchrun: Callable, tmp_path: Path) -> None:
    script = tmp_path / "hangs.py"
    script.write_text("import os, time\nprint('pid', os.getpid(), flush=True)\ntime.sleep(600)\n")
    with pytest.raises(pytest.fail.Exception, match="did not end in 12 s") as failure:
        torchrun(2, script, timeout_s=12)
    pids = [int(line.split()[1]) for line in str(failure.value).splitlines() if line.startswith("pid ")]
    assert len(pids) == 2
    assert not any(psutil.pid_exists(pid) for pid in pids)
