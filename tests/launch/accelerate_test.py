"""Jobs under `accelerate launch`, which gives its ranks the environment of torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from llmtrain.observe.metrics import read_lines
from tests.conftest import ROOT

LAUNCH = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2")  # on CPUs too: through torchrun


def test_two_ranks_train(small: Path, tmp_path: Path) -> None:
    job = ["-m", "llmtrain", "pretrain", small, f"run_dir={tmp_path / 'run'}", "train.steps=2", "parallel.tp=2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path)}  # no configuration of accelerate's
    done = subprocess.run(
        [sys.executable, *LAUNCH, *map(str, job)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "\n    1 trainer " in done.stderr
    assert [line["step"] for line in read_lines(str(tmp_path / "run/metrics.jsonl"))] == [1, 2]
