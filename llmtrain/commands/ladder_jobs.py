"""Runs the runs of a ladder: in processes here, or as one array job of Slurm. Each is `llmtrain run` of a document of
its own, which skips what is done and goes on from checkpoints."""

from __future__ import annotations

import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llmtrain.commands.run import GRACE_S, child_environment, die_with, handlers, signal_group
from llmtrain.config.ladder import LadderConfig
from llmtrain.observe.files import write_whole

POLL_S = 0.05
SAID_CHARS = 300  # of what a run wrote last before it failed
NOTICE_S = 120  # before a time limit: Slurm asks the runs to save and end


@dataclass(frozen=True)
class Task:
    """Names a run that is not done."""

    id: str
    directory: str

    @property
    def log(self) -> str:
        """Returns the file of all that the run writes, those of earlier attempts first."""
        return os.path.join(self.directory, "run.log")

    @property
    def document(self) -> str:
        """Returns the path of its document."""
        return os.path.join(self.directory, "config.yaml")

    @property
    def command(self) -> list[str]:
        """Returns the command line that runs it, or goes on with it."""
        return [sys.executable, "-m", "llmtrain", "run", self.document]


@dataclass
class Running:
    """Holds the processes of tasks, with the times of their start, and a signal that asked all to end."""

    processes: dict[Task, tuple[subprocess.Popen, float]] = field(default_factory=dict)
    asked: int = 0  # the signal
    kill_at: float = math.inf

    def stop(self, number: int, frame: object) -> None:
        """Handles a signal: asks all to save and end."""
        self.asked, self.kill_at = number, min(self.kill_at, time.monotonic() + 2 * GRACE_S)
        self.send(signal.SIGTERM)

    def send(self, number: int) -> None:
        for process, _ in self.processes.values():
            signal_group(process.pid, number)

    def take_ended(self) -> list[tuple[Task, int, float]]:
        """Takes out the processes that have ended; returns their tasks, statuses and seconds."""
        if time.monotonic() > self.kill_at:
            self.send(signal.SIGKILL)
        ended = [(task, p.poll(), time.monotonic() - since) for task, (p, since) in self.processes.items()]
        found = [(task, status, seconds) for task, status, seconds in ended if status is not None]
        for task, _, _ in found:
            del self.processes[task]
        return found


def run_local(tasks: Sequence[Task], ladder: LadderConfig, name: str) -> None:
    """Runs tasks here, `ladder.workers` at a time. One that fails is told, and the others go on.

    Raises SystemExit(128 + signal) after SIGINT or SIGTERM, when all have saved and ended.
    """
    waiting, running, done = list(tasks), Running(), 0
    with handlers(running.stop):
        while running.processes or (waiting and not running.asked):
            while waiting and len(running.processes) < ladder.workers and not running.asked:
                task = waiting.pop(0)
                running.processes[task] = (start(task, ladder), time.monotonic())
                if running.asked:  # between the start and the note of it
                    running.send(signal.SIGTERM)
            for task, status, seconds in running.take_ended():
                done += 1
                said = f"stopped after {seconds:.0f} s" if running.asked and status else outcome(task, status, seconds)
                _say(f"[{done}/{len(tasks)}] {task.id}: {said}")
            time.sleep(POLL_S)
    if running.asked:
        raise SystemExit(128 + running.asked)


def start(task: Task, ladder: LadderConfig) -> subprocess.Popen:
    """Starts a run, which is asked to end when this process dies."""
    parent = os.getpid()
    with open(task.log, "ab") as log:
        return subprocess.Popen(
            task.command,
            env=child_environment(ladder.ranks * ladder.workers),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            process_group=0,
            preexec_fn=lambda: die_with(parent),
        )


def outcome(task: Task, status: int, seconds: float) -> str:
    """Returns what is told of a run that has ended."""
    if status == 0:
        return f"done in {seconds:.0f} s"
    last = Path(task.log).read_text(encoding="utf-8", errors="replace").strip()[-SAID_CHARS:]
    how = f"ended by {signal.Signals(-status).name}" if status < 0 else f"failed with status {status}"
    return f"{how} after {seconds:.0f} s; its log is {task.log}, its last words: {' '.join(last.split()) or 'none'}"


def run_slurm(tasks: Sequence[Task], ladder: LadderConfig, name: str) -> None:
    """Submits one array job over the tasks and waits for its end. Raises RuntimeError when Slurm takes no job."""
    path = os.path.join(os.path.dirname(tasks[0].directory), "array.sbatch")
    write_whole(path, script(tasks, ladder, name))
    try:
        submitted = subprocess.run(["sbatch", "--wait", path], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    except OSError as error:
        raise RuntimeError(f"sbatch cannot be started: {error.strerror}; set ladder.executor=local") from None
    if submitted.returncode and not submitted.stdout.strip():  # else it was submitted, and tasks of it failed
        raise RuntimeError(f"sbatch took no job (exit status {submitted.returncode}): {submitted.stderr.strip()}")
    _say(submitted.stdout.strip())


def script(tasks: Sequence[Task], ladder: LadderConfig, name: str) -> str:
    """Returns the script of the array job. Each task writes its log as a run here does; near the time limit it is asked
    to save and end."""
    options = {
        **{
            "job-name": re.sub(r"[^\w.-]", "-", name),
            "array": f"0-{len(tasks) - 1}%{ladder.workers}",
            "output": "/dev/null",
        },
        **{"signal": f"B:TERM@{NOTICE_S}", **ladder.slurm},
    }
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH --{option}={value}" for option, value in options.items()),
            f"directories=({shlex.join(task.directory for task in tasks)})",
            "directory=${directories[$SLURM_ARRAY_TASK_ID]}",
            f'exec {shlex.quote(sys.executable)} -m llmtrain run "$directory/config.yaml" >>"$directory/run.log" 2>&1',
            "",
        ]
    )


def _say(line: str) -> None:
    print(line, flush=True)
