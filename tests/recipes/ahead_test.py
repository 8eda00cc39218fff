"""GRPO that samples ahead, with real workers: its staleness, workers that are killed, its evaluation beside training,
and a record that is replayed; of single answers and of episodes."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from pathlib import Path

import psutil
import pytest

from llmtrain.data.chat import CHATML
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
    *("eval.every_steps=3", "eval.problems=5", "eval.samples=2", "eval.text_seqs=3"),
)
DEADLY = """
import os, signal
from llmtrain.envs.base import Reply

class Guess:
    tools, role, players, turns = (), "user", 1, 0

    def __init__(self, flag):
        self.flag = flag

    def start(self, example):
        self.number = example["number"]
        return [{"role": "user", "content": "Guess a number."}]

    def step(self, text):
        Guess.turns += 1
        if Guess.turns == 9 and not os.path.exists(self.flag):
            open(self.flag, "x").close()
            os.kill(os.getpid(), signal.SIGKILL)
        if str(self.number) in text:
            return Reply(done=True, parts={"found": 1.0})
        return Reply([{"role": "user", "content": "no"}])

    def close(self):
        pass
"""
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


def of_training(line: dict) -> dict:
    """What a replay must give again: all but what sampling ahead says of itself, seconds, and the entropy of answers,
    which is a mean over other batches."""
    left_out = {"eval/entropy", *OF_SAMPLING, *(name for name in line if name.endswith(("_s", "_bytes")))}
    return {name: value for name, value in line.items() if name not in left_out}


def check_replay(directory: Path, lines: list[dict], again: list[dict]) -> None:
    """Asserts that two runs below the directory, `recorded` and `replayed`, are one: their metrics, and their last
    checkpoints byte for byte. What workers answered beside the first is what trainers answered in the second."""
    assert list(map(of_training, again)) == list(map(of_training, lines))
    evaluated = [line["step"] for line in lines if "eval/pass@2" in line]
    assert evaluated == [0, 3, 6, STEPS] and all("eval_beside_s" in lines[step] for step in evaluated)
    assert [line.get("eval/entropy") for line in lines] == [
        value if value is None else pytest.approx(value, abs=1e-5) for value in (x.get("eval/entropy") for x in again)
    ]
    parts = [path.relative_to(directory / "recorded") for path in (directory / "recorded").rglob("*.safetensors")]
    weights = [path for path in parts if path.parts[0] == "checkpoints" and path.parts[1].endswith(f"{STEPS:08d}")]
    assert len(weights) == 2  # a file of each rank
    for path in weights:
        assert (directory / "recorded" / path).read_bytes() == (directory / "replayed" / path).read_bytes()


def run(directory: Path, name: str, *overrides: str) -> tuple[list[dict], str]:
    """Runs GRPO on two ranks; returns its metrics, and what it said."""
    places = (f"run_dir={directory / name}", f"data.train={directory}/problems.jsonl")
    start = (f"model.init_from={directory / 'start'}", f"data.held_out={directory}/problems.jsonl")
    done = run_forked(2, "llmtrain", "grpo", directory / "small.yaml", *places, *start, *SETTINGS, *overrides)
    assert done.returncode == 0, done.stdout
    return read_lines(str(directory / name / "metrics.jsonl")), done.stdout


@pytest.fixture
def directory(small_data: Path, tmp_path: Path) -> Path:
    (tmp_path / "small.yaml").write_text(DOCUMENT.format(data=small_data))
    save_model(tmp_path, "start", small_data / "tokenizer", 0)
    return tmp_path


def write_problems(directory: Path) -> None:
    problems = [{"prompt": f"say {i % 3} {'x' * (i % 5)}:", "answer": str(i % 3)} for i in range(32)]
    (directory / "problems.jsonl").write_text("".join(json.dumps(line) + "\n" for line in problems))


@pytest.mark.slow
def test_a_run_that_goes_on_asks_again_what_was_not_answered(directory: Path) -> None:
    """As if it had been killed behind the checkpoint of step 4, before the workers had answered for that step."""
    write_problems(directory)
    settings = ("optim.schedule=constant", "eval.every_steps=4", "eval.text=false")
    lines, _ = run(directory, "cut", "train.steps=4", *settings)
    assert [line["step"] for line in lines] == list(range(5)) and lines[4]["eval/problems"] == 5
    cut = {name: value for name, value in lines[4].items() if name == "eval_s" or not name.startswith("eval")}
    text = "".join(json.dumps(line) + "\n" for line in [*lines[:4], cut])
    (directory / "cut" / "metrics.jsonl").write_text(text)
    again, _ = run(directory, "cut", *settings)
    assert [line["step"] for line in again if "eval/problems" in line] == [0, 4, 8] and again[:4] == lines[:4]
    assert of_training(again[4]) == of_training(lines[4])


@pytest.mark.slow
def test_a_run_with_a_killed_worker_and_its_replay(directory: Path) -> None:
    write_problems(directory)
    killed, stop = [], threading.Event()
    killer = threading.Thread(target=kill_a_worker, args=(killed, stop))
    killer.start()
    lines, _ = run(directory, "recorded", "rollout.record=true")
    stop.set()
    killer.join()
    assert len(killed) == 1 and [line["step"] for line in lines] == list(range(STEPS + 1))
    assert all(0 <= line["staleness_max"] <= 2 for line in lines[1:]) and lines[1]["staleness_max"] == 0
    assert max(line["staleness_max"] for line in lines[1:]) > 0
    again, _ = run(directory, "replayed", f"rollout.replay={directory}/recorded/rollouts")
    check_replay(directory, lines, again)


@pytest.mark.slow
@pytest.mark.parametrize("inflight", ["continue", "restart"])
def test_episodes_of_a_worker_that_is_killed_in_one_and_their_replay(inflight: str, directory: Path) -> None:
    """The environment kills its process at the ninth turn that it hears, once."""
    (directory / "problems.jsonl").write_text(
        "".join(json.dumps({"number": i % 3, "answer": str(i % 3)}) + "\n" for i in range(32))
    )
    (directory / "chatml.jinja").write_text(CHATML)
    (directory / "deadly.py").write_text(DEADLY)
    own = {"function": f"{directory}/deadly.py:Guess", "args": {"flag": f"{directory}/flag"}, "unsandboxed": True}
    settings = (
        f"rollout.environment={json.dumps({**own, 'max_turns': 3, 'threads': 1})}",
        f"rollout.stop={json.dumps(list('aeiou0123456789'))}",
        *(f"tokenizer.chat_template={directory}/chatml.jinja", "train.seq_len=250", f"rollout.inflight={inflight}"),
    )
    lines, said = run(directory, "recorded", "rollout.record=true", *settings)
    assert (directory / "flag").exists() and re.search(r"ended by SIGKILL(?s:.)*prompts go to others", said)
    assert all(line["turns_mean"] > 1 and line["environment_tokens_mean"] > 0 for line in lines[1:])
    assert 0 < max(line["staleness_max"] for line in lines[1:]) <= 2
    again, _ = run(directory, "replayed", f"rollout.replay={directory}/recorded/rollouts", *settings)
    check_replay(directory, lines, again)
