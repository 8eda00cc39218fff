"""GRPO that samples ahead, with real workers: its staleness, a worker that is killed, and its record replayed."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from pathlib import Path

import psutil
import pytest

from llmtrain.observe.metrics import read_lines
from tests.forked import run_forked
from tests.recipes.kills_test import save_model
from tests.small_run import DOCUMENT

STEPS = 8
SETTINGS = (
    *("rewards=[{name: first_integer}]", "rollout.max_new_tokens=16", f"train.steps={STEPS}", "grpo.dynamic_rounds=2"),
    *("rollout.placement=ahead", "rollout.workers=2", "rollout.max_staleness=2", "rollout.deadline_s=50"),
    "engine.timeout_s=120",
    "rollout.verify=checksum",
    *("rollout.inflight=continue", "checkpoint.every_steps=4"),
)
OF_SAMPLING = {
    *("staleness_mean", "staleness_max", "queue_groups", "trainer_idle_s", "workers_idle_s", "workers"),
    *("rejected_fraction", "load_bytes", "load_s"),
}


def kill_a_worker(killed: list[int], stop: threading.Event) -> None:
    """Kills one worker that has computed for a second and a half: it starts, or samples."""
    while not stop.is_set() and not killed:
        time.sleep(0.1)
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "llmtrain.rollout.worker_process" in process.cmdline() and process.cpu_times().user > 1.5:
                    process.kill()
                    killed.append(process.pid)
                    break


@pytest.mark.slow
def test_a_run_with_a_killed_worker_and_its_replay(small_data: Path, tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(DOCUMENT.format(data=small_data))
    save_model(tmp_path, "start", small_data / "tokenizer", 0)
    problems = [{"prompt": f"say {i % 3} {'x' * (i % 5)}:", "answer": str(i % 3)} for i in range(32)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(line) + "\n" for line in problems))

    def run(name: str, *overrides: str) -> list[dict]:
        places = (f"run_dir={tmp_path / name}", f"data.train={tmp_path}/problems.jsonl")
        start = f"model.init_from={tmp_path / 'start'}"
        done = run_forked(2, "llmtrain", "grpo", tmp_path / "small.yaml", *places, start, *SETTINGS, *overrides)
        assert done.returncode == 0, done.stdout
        return read_lines(str(tmp_path / name / "metrics.jsonl"))

    killed, stop = [], threading.Event()
    killer = threading.Thread(target=kill_a_worker, args=(killed, stop))
    killer.start()
    lines = run("recorded", "rollout.record=true")
    stop.set()
    killer.join()
    assert len(lines) == STEPS and all(0 <= line["staleness_max"] <= 2 for line in lines)
    assert max(line["staleness_max"] for line in lines) > 0 and lines[0]["staleness_max"] == 0
    again = run("replayed", f"rollout.replay={tmp_path}/recorded/rollouts")

    def of_training(line: dict) -> dict:
        left_out = OF_SAMPLING | {name for name in line if name.endswith(("_s", "_bytes"))}
        return {name: value for name, value in line.items() if name not in left_out}

    assert list(map(of_training, again)) == list(map(of_training, lines))
    parts = [path.relative_to(tmp_path / "recorded") for path in (tmp_path / "recorded").rglob("*.safetensors")]
    weights = [path for path in parts if path.parts[0] == "checkpoints" and path.parts[1].endswith(f"{STEPS:08d}")]
    assert len(killed) == 1 and len(weights) == 2  # a file of each rank
    for path in weights:
        assert (tmp_path / "recorded" / path).read_bytes() == (tmp_path / "replayed" / path).read_bytes()
