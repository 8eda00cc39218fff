"""A cleaning job on this machine, as Slurm arrays and on Ray: what is done stays done, a killed task is redone, and all
write the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("datatrove")

from llmtrain.config.clean import CleanConfig, CollectConfig, ExecutionConfig
from llmtrain.data.clean import execute as module
from llmtrain.data.clean.collect import Collect
from llmtrain.data.clean.execute import command, execute, failure, refuse_unreachable, run_command
from llmtrain.data.clean.job import Job, make_job, phases, read_job
from llmtrain.data.clean.task import pending
from tests.conftest import ROOT

WORDS = ["the", "sun", "of", "a", "day", "that", "is", "with", "us", "and", "in", "the", "house", "to", "be", "seen"]
OFF = ("extract", "repair", "language", "repetition", "quality", "c4", "fineweb", "contamination", "pii")


def write_inputs(folder: Path, files: int = 4, rows: int = 6) -> None:
    """Files of rows; the last row of each is the first of all."""
    folder.mkdir(parents=True)
    for file in range(files):
        texts = [f"file {file} row {row}: " + " ".join(WORDS[(row + file) % 5 :]) for row in range(rows)]
        texts.append("file 0 row 0: " + " ".join(WORDS))
        (folder / f"{file}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def job(tmp_path: Path, name: str, dedup: bool = True, **settings: int | dict | None) -> Job:
    """A job over the inputs, in a directory of its own."""
    if not (tmp_path / "rows").exists():
        write_inputs(tmp_path / "rows")
    inputs = [CollectConfig(name="rows", type="jsonl", path=str(tmp_path / "rows"))]
    (tmp_path / name).mkdir(exist_ok=True)
    clean = CleanConfig(**dict.fromkeys(OFF), dedup={"minhash": None} if dedup else None)
    return make_job(str(tmp_path / name), inputs, clean, ExecutionConfig(**{"tasks": 4, **settings}))


def documents(root: str) -> list[str]:
    """The texts that a job left, in the order of their files."""
    import zstandard

    found = []
    for path in sorted(Path(root, "documents").rglob("*.zst")):
        with zstandard.open(path, "rt", encoding="utf-8") as lines:
            found += [json.loads(line)["text"] for line in lines]
    return found


def told_into(seen: list[tuple[str, int, int]]) -> module.Told:
    return lambda *each: seen.append(each)


def test_a_job_is_known_by_its_directory(tmp_path: Path) -> None:
    made = job(tmp_path, "a", tasks=9)
    made.write()
    assert made.tasks == {"rows": 4}, "at most one task a file"
    assert read_job(made.root) == made
    assert [(p.name, p.tasks) for p in phases(read_job(made.root))] == [(p.name, p.tasks) for p in phases(made)]


def test_here_and_in_processes_alike(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    here, apart = job(tmp_path, "here", tasks=2), job(tmp_path, "apart", tasks=2, workers=2)
    execute(here, "local", told_into(seen))
    execute(apart, "local", told_into([]))
    assert len(documents(here.root)) == 24, "24 rows, of which the first stands four times more"
    assert documents(here.root) == documents(apart.root)
    assert seen[:3] == [("clean-rows", done, 2) for done in range(3)]
    again: list[tuple[str, int, int]] = []
    before = {p: p.stat().st_mtime_ns for p in Path(here.root).rglob("*.zst")}
    execute(here, "local", told_into(again))
    assert again == [(phase.name, phase.tasks, phase.tasks) for phase in phases(here)], "nothing is done twice"
    assert before == {p: p.stat().st_mtime_ns for p in Path(here.root).rglob("*.zst")}


def test_a_killed_task_is_redone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, killed = job(tmp_path, "whole", dedup=False), job(tmp_path, "killed", dedup=False, workers=2)
    execute(whole, "local", told_into([]))
    started, begin = [], module.start

    def start(root: str, phase: str, rank: int) -> subprocess.Popen:
        process = begin(root, phase, rank)
        if len(started) in (1, 3):
            threading.Timer(0.4, lambda: process.poll() is None and os.kill(process.pid, signal.SIGKILL)).start()
        started.append(rank)
        return process

    monkeypatch.setattr(module, "start", start)
    execute(killed, "local", told_into([]))
    assert len(started) == sum(phase.tasks for phase in phases(killed)) + 2, "two were started again"
    assert documents(killed.root) == documents(whole.root)
    assert not [phase.name for phase in phases(killed) if pending(killed.root, phase)]


def test_a_task_that_always_fails_is_named_and_the_rest_stays(tmp_path: Path) -> None:
    broken = job(tmp_path, "broken", tasks=1, workers=2, retries=1)
    broken.write()
    held = json.loads(Path(broken.root, "job.json").read_text())
    (tmp_path / "rows/0.jsonl").unlink()
    (tmp_path / "rows/0.jsonl").mkdir()  # counted as no file: no failure
    held["inputs"][0]["type"] = "odd"
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=r"clean-rows: task \d failed 2 times \(exit status 1\); its log is"):
        real = Job.write
        try:
            Job.write = lambda self: Path(self.root, "job.json").write_text(json.dumps(held))  # type: ignore[method-assign]
            execute(broken, "local", told_into([]))
        finally:
            Job.write = real  # type: ignore[method-assign]
    assert time.monotonic() - started < 60


def test_a_task_that_fails_here_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(self: Collect, *_: object) -> Iterator[None]:
        raise error
        yield

    monkeypatch.setattr(Collect, "run", broken)
    named = r"clean-rows: task 0 failed \(KeyError: 'oh no'\); its log is"
    for error, told in ((KeyError("oh no"), named), (ValueError("x"), "^x$")):
        with pytest.raises((RuntimeError, ValueError), match=told):
            execute(job(tmp_path, type(error).__name__), "local", told_into([]))
        assert capfd.readouterr().err == "", "no traceback on the screen"
    assert "oh no" in (tmp_path / "KeyError/logs/clean-rows/logs/task_00000.log").read_text()


def test_what_is_told_of_a_failure(tmp_path: Path) -> None:
    errors = tmp_path / "logs/p/errors"
    errors.mkdir(parents=True)
    (errors / "00003.txt").write_text("x" * 1000 + "the end")
    told = failure(str(tmp_path), "p", 3, -9, 2)
    assert told.startswith("p: task 3 failed 2 times (ended by SIGKILL)")
    assert told.endswith("the end") and len(told) < 1000 and "logs/p/logs/task_00003.log" in told


def test_a_task_ends_with_who_started_it(tmp_path: Path) -> None:
    made = job(tmp_path, "orphan")
    made.write()
    env = os.environ | {"LLMTRAIN_CLEAN_PARENT": "1", "PYTHONPATH": str(ROOT)}
    code = "import sys, time; from llmtrain.data.clean import task; task.run_task = lambda *a: time.sleep(60);"
    code += "task.main(sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", code, made.root, "clean-rows", "0"], env=env, timeout=50)
    assert done.returncode == 1


FAKE_SBATCH = """#!/usr/bin/env python3
# Writes down its arguments and script, runs the array's tasks on the spot, as after their dependencies.
import json, os, re, subprocess, sys
calls = os.environ["CALLS"]
script = open(sys.argv[-1]).read()
number = sum(1 for _ in open(calls)) + 1 if os.path.exists(calls) else 1
first, last = map(int, re.search(r"#SBATCH --array=(\\d+)-(\\d+)", script).groups())
with open(calls, "a") as file:
    print(json.dumps([sys.argv[1:-1], script]), file=file)
if os.environ.get("REFUSE"):
    sys.exit(1)
failed = 0
offset = next(a.split("RUN_OFFSET=")[1] for a in sys.argv if "RUN_OFFSET=" in a)
for task in range(first, last + 1):
    if os.environ.get("LOSE") == f"{number}:{task}":
        continue
    done = subprocess.run(["bash", sys.argv[-1]], stderr=subprocess.DEVNULL,
                          env=os.environ | {"SLURM_ARRAY_TASK_ID": str(task), "RUN_OFFSET": offset})
    failed = failed or done.returncode
print(f"Submitted batch job {1000 + number}")
sys.exit(failed if "--wait" in sys.argv else 0)  # as the real one does
"""


@pytest.fixture
def fake_sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `sbatch` that runs the tasks at once; returns the file that its calls are written to."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "sbatch").write_text(FAKE_SBATCH)
    (folder / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path / "calls"


SLURM = {"partition": "cpu", "time": "1:00:00", "max_array_size": 1}


def test_slurm_arrays(tmp_path: Path, fake_sbatch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = job(tmp_path, "here", tasks=2), job(tmp_path, "there", tasks=2, slurm=SLURM)
    execute(here, "local", told_into([]))
    monkeypatch.setenv(
        "LOSE", "2:0"
    )  # the second array of the first phase: its task never runs, what is behind it refuses to
    with pytest.raises(RuntimeError, match=r"clean-rows: 1 of 2 tasks are not done; .* goes on with them"):
        execute(there, "slurm", told_into([]))
    monkeypatch.delenv("LOSE")
    first = len(fake_sbatch.read_text().splitlines())
    execute(there, "slurm", told_into([]))
    calls = [json.loads(line) for line in fake_sbatch.read_text().splitlines()]
    assert documents(there.root) == documents(here.root)
    arguments, script = calls[first]
    assert "#SBATCH --array=0-0%1" in script, "the one task that was left"
    assert "#SBATCH --partition=cpu" in script and "#SBATCH --time=1:00:00" in script
    assert f"-m llmtrain.data.clean.task {there.root} clean-rows" in script and "pik" not in script
    assert "--kill-on-invalid-dep=yes" in arguments
    assert calls[first + 1][0][-1].startswith("--dependency=afterok:") or "--wait" in calls[first + 1][0]
    assert ["--wait" in arguments for arguments, _ in calls[first:]].count(True) == 1 and "--wait" in calls[-1][0]
    assert not list(Path(there.root).rglob("*.pik")), "nothing is pickled"


def test_arrays_are_cut_where_slurm_wants_it(tmp_path: Path, fake_sbatch: Path) -> None:
    there = job(tmp_path, "there", dedup=False, slurm=SLURM | {"max_array_size": 3})
    execute(there, "slurm", told_into([]))
    calls = [json.loads(line) for line in fake_sbatch.read_text().splitlines()]
    offsets = [a.split("RUN_OFFSET=")[1] for arguments, _ in calls[:2] for a in arguments if "RUN_OFFSET" in a]
    assert offsets == ["0", "3"], "four tasks, at most three in an array"


def test_what_slurm_refuses_is_one_line(tmp_path: Path, fake_sbatch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"data\.execution\.slurm: .*unexpected keyword argument 'queue'"):
        execute(job(tmp_path, "a", slurm=SLURM | {"queue": "x"}), "slurm", told_into([]))
    monkeypatch.setenv("REFUSE", "1")
    with pytest.raises(RuntimeError, match=r"sbatch took no job \(exit status 1\)"):
        execute(job(tmp_path, "b", slurm=SLURM), "slurm", told_into([]))


def test_a_command_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match="exit status 3: oh no"):
        run_command([sys.executable, "-c", "import sys; sys.stderr.write('oh no'); sys.exit(3)"])


def test_a_cluster_that_does_not_answer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ray_address=127\.0\.0\.1:1: nothing answers there .*; start the cluster"):
        refuse_unreachable("127.0.0.1:1")
    with pytest.raises(ValueError, match="nothing answers"):
        refuse_unreachable("ray://127.0.0.1:99999")
    refuse_unreachable(None)
    refuse_unreachable("auto")


def test_commands_are_this_interpreter() -> None:
    assert command("r", "p", 4) == [sys.executable, "-m", "llmtrain.data.clean.task", "r", "p", "4"]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_ray_on_one_node(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    here, there = job(tmp_path, "here"), job(tmp_path, "there")
    execute(here, "local", told_into([]))
    seen: list[tuple[str, int, int]] = []
    execute(there, "ray", told_into(seen))
    assert documents(there.root) == documents(here.root)
    assert ("clean-rows", 4, 4) in seen and not [p.name for p in phases(there) if pending(there.root, p)]
