"""Programs that workers run ahead of training: one of these is killed within a run of the program, and what the steps
took is replayed without a program."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from llmtrain.data.chat import CHATML
from llmtrain.observe.metrics import read_lines
from llmtrain.trainer.recorded import read_groups
from tests.conftest import ROOT
from tests.forked import run_forked
from tests.recipes.ahead_test import of_training
from tests.recipes.kills_test import save_model
from tests.small_run import DOCUMENT

pytest.importorskip("uvicorn")
STEPS, PROMPTS, RUNS = 5, 4, 3
ASKS_TWICE = """
import glob, os, signal, time
from openai import OpenAI

class Program:
    def __init__(self, folder, pause_s):
        self.folder, self.pause_s = folder, pause_s
        open(f"{folder}/{os.getpid()}.pid", "x").close()

    def __call__(self, example, base_url, api_key):
        client = OpenAI(base_url=base_url, api_key=api_key, max_retries=0)
        ask = [{"role": "user", "content": f"Say {example['answer']}"}]
        said = self.say(client, ask)
        time.sleep(self.pause_s)
        self.say(client, [*ask, {"role": "assistant", "content": "(left out)"}, {"role": "user", "content": "again"}])
        if example.get("fails"):
            raise RuntimeError("such a row")
        if os.path.exists(f"{self.folder}/armed"):
            try:
                os.rename(f"{self.folder}/armed", f"{self.folder}/killed.{os.getppid()}")  # one of all alone can
            except FileNotFoundError:
                return 0.0
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(600)
        return sum(letter < "n" for letter in said) / max(1, len(said))  # of a random model some more, some less

    def say(self, client, messages):
        return client.chat.completions.create(model="m", messages=messages).choices[0].message.content or ""
"""
SETTINGS = (
    *("rewards=[]", "rollout.max_new_tokens=12", f"train.steps={STEPS}", f"grpo.prompts_per_step={PROMPTS}"),
    *(f"rollout.group_size={RUNS}", "train.seq_len=200", "checkpoint.every_steps=5", "grpo.std_of=batch"),
    *("rollout.placement=ahead", "rollout.workers=2", "rollout.max_staleness=2", "rollout.deadline_s=50"),
    *("rollout.verify=checksum", "engine.timeout_s=120", "data.held_out=null"),
    *("eval.every_steps=3", "eval.text_seqs=3"),
)


@pytest.fixture
def directory(small_data: Path, tmp_path: Path) -> Path:
    """A model, rows, and the program."""
    (tmp_path / "small.yaml").write_text(DOCUMENT.format(data=small_data))
    save_model(tmp_path, "start", small_data / "tokenizer", 0)
    (tmp_path / "chatml.jinja").write_text(CHATML)
    (tmp_path / "program.py").write_text(ASKS_TWICE)
    (tmp_path / "own").mkdir()
    rows = [{"answer": str(i % 3), "number": i, **({"fails": True} if i == 3 else {})} for i in range(STEPS * PROMPTS)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def run(
    directory: Path, name: str, *overrides: str, ranks: int = 2, fails: bool = False, pause_s: float = 0.0
) -> tuple[list[dict], str]:
    """Runs GRPO, with a program that pauses between its requests; returns its metrics, and what it said."""
    args = {"folder": f"{directory}/own", "pause_s": pause_s}
    agent = {"function": f"{directory}/program.py:Program", "args": args}
    own = (
        *(f"run_dir={directory / name}", f"data.train={directory}/rows.jsonl"),
        *(f"model.init_from={directory / 'start'}", f"tokenizer.chat_template={directory}/chatml.jinja"),
        f"rollout.agent={json.dumps({**agent, 'processes': 3, 'deadline_s': 20})}",
    )
    done = run_forked(ranks, "llmtrain", "grpo", directory / "small.yaml", *own, *SETTINGS, *overrides)
    assert bool(done.returncode) == fails, done.stdout
    return [] if fails else read_lines(str(directory / name / "metrics.jsonl")), done.stdout


def left(directory: Path) -> list[str]:
    """Returns the processes of the program that still live."""
    found = []
    for file in (directory / "own").glob("*.pid"):
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(int(file.stem))
            if process.status() != psutil.STATUS_ZOMBIE and "llmtrain" in " ".join(process.cmdline()):
                found.append(file.stem)
    return found


def same_files(directory: Path, names: Sequence[str]) -> None:
    """Asserts that the last checkpoints of two runs hold the same bytes."""
    parts = [path.relative_to(directory / names[0]) for path in (directory / names[0]).rglob("*.safetensors")]
    weights = [path for path in parts if path.parts[0] == "checkpoints" and path.parts[1].endswith(f"{STEPS:08d}")]
    assert weights
    for path in weights:
        first, second = ((directory / name / path).read_bytes() for name in names)
        assert first == second, path


def pids(directory: Path) -> set[str]:
    """Returns the numbers of all processes of the program that ever were."""
    return {file.stem for file in (directory / "own").glob("*.pid")}


def check_lines(lines: Sequence[dict]) -> None:
    """Asserts what every run of these tests shows: steps by weights that are not too old, and something to learn."""
    trained = [line for line in lines if line["step"]]
    assert [line["step"] for line in lines if "eval/loss" in line] == [0, 3, STEPS]
    assert [line["step"] for line in trained] == list(range(1, STEPS + 1))
    assert all(0 <= line["staleness_max"] <= 2 for line in trained) and trained[0]["staleness_max"] == 0
    assert max(line["staleness_max"] for line in trained) > 0
    assert any(line["reward_mean"] > 0 and line["grad_norm"] > 0 for line in trained)


def check_record(directory: Path) -> None:
    """Asserts that each prompt was taken once, with both rows of each run, by weights that the step allows."""
    numbers, failed = [], 0
    for step in range(STEPS):
        path = directory / "recorded" / "rollouts" / f"step-{step + 1:08d}.safetensors"
        groups, made, rows = read_groups(str(path))
        numbers += groups
        assert made["rollout.agent"]["function"] == "Program" and len(made["rollout.agent.function"]) == 64
        assert len(set(rows)) == PROMPTS
        for group in groups.values():
            assert [sample.attempt for sample in group] == [0, 0, 1, 1, 2, 2]
            assert all(0 <= step - version <= 2 for sample in group for version in sample.versions)
            assert all(len(set(sample.versions)) == 1 for sample in group)
            errors = {error for sample in group for error in sample.errors.values()}
            assert errors <= {"RuntimeError: such a row"}
            failed += len(errors)
    assert failed == 1  # every row is taken once, and of one all runs fail
    assert numbers == list(range(PROMPTS * STEPS))


@pytest.mark.slow
def test_a_worker_is_killed_in_a_run_of_the_program_and_what_was_taken_is_replayed(directory: Path) -> None:
    (directory / "own" / "armed").touch()
    lines, said = run(directory, "recorded", "rollout.record=true")
    assert list((directory / "own").glob("killed.*"))
    assert re.search(r"ended by SIGKILL(?s:.)*prompts go to others", said), said
    assert len(pids(directory)) >= 2 * 3 + 3 and left(directory) == []
    check_lines(lines)
    check_record(directory)
    before = pids(directory)
    again, _ = run(directory, "replayed", f"rollout.replay={directory}/recorded/rollouts")
    assert list(map(of_training, again)) == list(map(of_training, lines)) and pids(directory) == before
    same_files(directory, ("recorded", "replayed"))
    (directory / "program.py").write_text(ASKS_TWICE + "# other contents")
    _, said = run(directory, "other", f"rollout.replay={directory}/recorded/rollouts", fails=True)
    assert re.search(r"rollout.agent.function=\w{64}: \S*step-00000001.safetensors was made with \w{64}; replay", said)


@pytest.mark.slow
def test_runs_go_on_under_newer_weights_and_are_replayed(directory: Path) -> None:
    """As above, in one process, with nobody killed: some row has tokens of two versions, in rising order."""
    lines, _ = run(directory, "recorded", "rollout.record=true", "rollout.inflight=continue", ranks=1, pause_s=0.4)
    check_lines(lines)
    again, _ = run(directory, "replayed", f"rollout.replay={directory}/recorded/rollouts", ranks=1, pause_s=0.4)
    assert list(map(of_training, again)) == list(map(of_training, lines))
    same_files(directory, ("recorded", "replayed"))
    paths = sorted((directory / "recorded" / "rollouts").glob("*.safetensors"))
    samples = [s for path in paths for group in read_groups(str(path))[0].values() for s in group]
    assert all(s.versions == sorted(s.versions) for s in samples)
    runs = zip(samples[::2], samples[1::2], strict=True)
    assert any(len({*first.versions, *second.versions}) > 1 for first, second in runs)
    assert left(directory) == []


@pytest.mark.slow
def test_a_record_in_step_is_replayed(directory: Path) -> None:
    in_step = ("rollout.placement=colocated", "rollout.workers=0", "rollout.max_staleness=0", "rollout.deadline_s=600")
    lines, _ = run(directory, "recorded", "rollout.record=true", *in_step, ranks=1)
    before = pids(directory)
    again, _ = run(directory, "replayed", f"rollout.replay={directory}/recorded/rollouts", *in_step, ranks=1)
    assert len(before) == 3 and pids(directory) == before and left(directory) == []
    assert list(map(of_training, again)) == list(map(of_training, lines))
    same_files(directory, ("recorded", "replayed"))


@pytest.mark.slow
def test_the_document_of_an_agent_samples_ahead(directory: Path, small_data: Path) -> None:
    """configs/grpo/agent.yaml, by the shell, two steps on a model of seconds. Generator and trainer agree about every
    token of the first step to 1e-3, or the run would stop."""
    ask = [{"role": "user", "content": "a digit"}]
    rows = [{"messages": ask, "answer": str(i % 10)} for i in range(32)]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = {
        **{"model": {"init_from": f"{directory}/start"}, "data": {"train": f"{directory}/rows.jsonl"}},
        "tokenizer": {"path": f"{small_data}/tokenizer", "chat_template": f"{directory}/chatml.jinja"},
    }
    given = [f"{key}={json.dumps(value)}" for key, value in small.items()]
    given += [f"run_dir={directory}/run", "train.steps=2", "engine.precision=fp32", "log.wandb='off'"]
    given += ["rollout.placement=ahead", "rollout.workers=1", "rollout.max_staleness=1", "rollout.verify=checksum"]
    command = shlex.join([sys.executable, "-m", "llmtrain", "grpo", "configs/grpo/agent.yaml", *given])
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = read_lines(str(directory / "run" / "metrics.jsonl"))
    assert [line["step"] for line in lines] == [1, 2] and lines[0]["staleness_max"] == 0
    assert all(line["step_samples"] == 16 * 8 and 1 < line["turns_mean"] <= 2 for line in lines)
    assert all(line["reward_errors"] == 0 and line["logprob_gap_max"] < 1e-3 for line in lines[:1])
