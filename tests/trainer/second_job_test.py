"""A second job in a run directory is refused while the first is at work, and so is one that is not the same run."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, stop
from tests.forked import run_alone, run_forked

LONG = ("train.steps=100000", "checkpoint.every_steps=0", "eval.text=false")


@pytest.fixture
def at_work(small: Path, tmp_path: Path) -> subprocess.Popen[str]:
    """A job of two ranks that trains in tmp_path/run."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = ["-m", "llmtrain", "sft", small, f"run_dir={tmp_path}/run", *LONG]
    with open(tmp_path / "output", "w") as output:
        job = subprocess.Popen([*launcher, *arguments], cwd=ROOT, stdout=output, stderr=output, start_new_session=True)
    give_up = time.monotonic() + 90
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert job.poll() is None and time.monotonic() < give_up, (tmp_path / "output").read_text()
        time.sleep(0.1)
    yield job
    stop(job)


def test_while_another_job_is_at_work(small: Path, tmp_path: Path, at_work: subprocess.Popen[str]) -> None:
    run = f"run_dir={tmp_path}/run"
    config = (tmp_path / "run" / "config.yaml").read_bytes()
    for command in ("sft", "data", "tokenizer"):
        second = run_alone("llmtrain", command, str(small), run, "optim.lr=0.1")
        assert second.returncode == 2, second.stdout[-2000:]
        assert "run: another job is at work there: process " in second.stdout and "Traceback" not in second.stdout
    both = run_forked(2, "llmtrain", "sft", str(small), run)
    assert both.returncode != 0 and "another job is at work there: process " in both.stdout
    assert (tmp_path / "run" / "config.yaml").read_bytes() == config and at_work.poll() is None


def test_another_run_in_the_directory(small: Path, tmp_path: Path) -> None:
    run = f"run_dir={tmp_path}/run"
    short = ("train.steps=2", "checkpoint.every_steps=1")
    assert run_alone("llmtrain", "sft", str(small), run, *short).returncode == 0
    files = ("config.yaml", "run.json", "metrics.jsonl")
    before = [(tmp_path / "run" / name).read_bytes() for name in files]
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "1+1=", "answer": "2"}\n')
    refused = [
        ("sft", (f"data.train={other}", "seed=2"), ("seed=2: must stay 1", f"data.train={other} (sha256 ")),
        ("grpo", (f"model.init_from={tmp_path}/run",), ("command=grpo: must stay sft",)),
        ("pretrain", (), ("command=pretrain: must stay sft",)),
    ]
    for command, overrides, lines in refused:
        given = [*overrides, "train.steps=4", "model.num_layers=4"]
        done = run_alone("llmtrain", command, str(small), run, *given)
        assert done.returncode == 2 and all(line in done.stdout for line in lines), done.stdout[-2000:]
        assert [(tmp_path / "run" / name).read_bytes() for name in files] == before
    done = run_alone("llmtrain", "sft", str(small), run, "train.steps=4", "checkpoint.every_steps=1", "optim.lr=1e-3")
    assert done.returncode == 0, done.stdout[-2000:]
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    [event] = [event for event in events if event["event"] == "changed"]
    assert event["step"] == 2 and event["keys"] == {"optim.lr": [3e-3, 1e-3], "train.steps": [2, 4]}
    assert [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()] == [
        1,
        2,
        3,
        4,
    ]
