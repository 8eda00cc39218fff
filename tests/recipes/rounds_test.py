"""A run document with rounds, for real: killed in the middle of its second round it goes on there, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.conftest import ROOT

DOCUMENT = """
include: {small}
name: loop
run_dir: {folder}/{name}
rewards: [{{name: first_integer}}]
rollout: {{group_size: 8, max_new_tokens: 24}}
raft: {{prompts_per_step: 8, minibatches: 2}}
train: {{steps: 4}}
checkpoint: {{every_steps: 1}}
stages:
  - {{name: raft-0, command: pretrain, set: {{train: {{steps: 1}}}}}}
  - name: rounds
    repeat: 2
    stages:
      - name: raft-{{round}}
        command: raft
        set:
          seed: "{{round}}"
          model: {{init_from: "{{run}}/raft-{{previous}}"}}
          data: {{train: {folder}/one.jsonl}}
  - {{name: report, command: report, set: {{report: {{path: "{{run}}"}}}}}}
"""


def start(document: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "llmtrain", "run", str(document)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def numbers(run_dir: Path) -> list[tuple[float, ...]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(m["step"], m["loss"], m["reward_mean"], m["lr"]) for m in lines]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_kill_in_the_second_round_leaves_no_trace(small: Path, tmp_path: Path) -> None:
    problems = [{"prompt": "." * i, "answer": "7"} for i in range(1, 17)]
    (tmp_path / "one.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    runs = {name: tmp_path / name for name in ("whole", "killed")}
    for name in runs:
        text = DOCUMENT.format(small=small, folder=tmp_path, name=name)
        (tmp_path / f"{name}.yaml").write_text(text)
    whole = start(tmp_path / "whole.yaml")
    output = whole.communicate(timeout=300)[0]
    assert whole.returncode == 0, output[-3000:]
    killed, second = start(tmp_path / "killed.yaml"), runs["killed"] / "raft-2"
    end = time.monotonic() + 300
    while not list(second.glob("checkpoints/step-*2")):
        assert killed.poll() is None and time.monotonic() < end, killed.communicate()[0][-3000:]
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=60)
    again = start(tmp_path / "killed.yaml")
    output = again.communicate(timeout=300)[0]
    assert again.returncode == 0, output[-3000:]
    assert "[1/4] raft-0: was done before" in output and "[2/4] raft-1: was done before" in output
    assert "[3/4] raft-2\n" in output and not list(runs["killed"].glob("*.old1"))
    for name in ("raft-1", "raft-2"):
        assert numbers(runs["killed"] / name) == numbers(runs["whole"] / name)
        for file in (runs["whole"] / name / "checkpoints/step-00000004").glob("*.safetensors"):
            mine = load_file(runs["killed"] / name / "checkpoints/step-00000004" / file.name)
            assert all(mine[key].equal(tensor) for key, tensor in load_file(file).items())
    page = (runs["killed"] / "report/index.html").read_text()
    assert page.index("raft-1") < page.index("raft-2")
