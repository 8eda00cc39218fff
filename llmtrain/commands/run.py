"""Implements `llmtrain run`: runs the stages of a document, each in processes of its own, and goes on where it was."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import itertools
import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from llmtrain.commands.stage_files import contents, made_by, made_tokenizer, stages_read
from llmtrain.config.load import dump, stage_config
from llmtrain.config.schema import LogConfig, RunConfig, StageConfig
from llmtrain.observe.contents import CACHE, Checksums
from llmtrain.observe.files import write_whole
from llmtrain.observe.locks import locked
from llmtrain.observe.log import make_run_dir

GRACE_S = 40  # between asking a stage to stop and killing it; torchrun gives its workers 30
PR_SET_PDEATHSIG = 1  # prctl(2)
# glibc keeps freed blocks: a step takes the same sizes again and again, and fresh pages cost a CPU step about a tenth
KEEP_FREED = {"MALLOC_MMAP_THRESHOLD_": "2000000000", "MALLOC_TRIM_THRESHOLD_": "4000000000"}
HEAD = "# llmtrain run: "  # begins every stage.yaml
MEASURE = re.compile(r"(pass|maj)@\d+|perplexity")  # of eval.json, shown at the end


@dataclass(frozen=True)
class StageRun:
    """Describes one stage, ready to start."""

    stage: StageConfig
    directory: str
    config: str  # YAML
    tokenizer: str | None  # that it is the first to make, in the run directory
    made_from: list[str]  # stages whose files it reads
    hash: str  # of command, ranks, configuration, contents of data files, and the hash of the stage before

    @property
    def yaml(self) -> str:
        """Returns the path at which the stage's configuration is written."""
        return os.path.join(self.directory, "stage.yaml")

    @property
    def spent(self) -> str:
        """Returns the path of the file that holds the CPU time of attempts that did not end well."""
        return os.path.join(self.directory, "spent.json")

    @property
    def done(self) -> str:
        """Returns the path of the file that says that the stage has finished."""
        return os.path.join(self.directory, "done.json")

    @property
    def head(self) -> str:
        """Returns the first line of stage.yaml, which says whose work the directory holds."""
        return f"{HEAD}{self.stage.command}, ranks {self.stage.ranks}, job {self.hash}\n"


def main(config: RunConfig) -> int:
    """Runs the stages in order, skipping finished ones; returns 0, or the exit status of the stage that did not end
    well.

    Raises ValueError if the document has no stages, its directory cannot be written, another job is at work there, or
    files of other origin have names that it needs. Stages inherit the lock: when we are killed, the next run waits
    until they have ended.
    """
    stage_runs = planned_runs(config)
    make_run_dir(config.directory)
    with locked(config.directory, patience_s=GRACE_S + 10) as held:  # a killed run's stage may be about to end
        write_list(os.path.join(config.directory, "stages.json"), [r.stage.name for r in stage_runs])
        for number, stage_run in enumerate(stage_runs, 1):
            title = f"[{number}/{len(stage_runs)}] {stage_run.stage.name}"
            _say(f"{title}: was done before" if is_done(stage_run) else title)
            if not is_done(stage_run) and (status := run_stage(stage_run, title, held)):
                return status
    summarize(config.directory, stage_runs)
    return 0


def planned_runs(config: RunConfig) -> list[StageRun]:
    """Returns the stages of a document, ready to start. What is only logged does not enter the hashes."""
    if not isinstance(config, RunConfig):
        raise ValueError(f"{config.name}: has no `stages:`; add them, or name the command of a single stage")
    stage_runs: list[StageRun] = []
    makers: dict[str, str] = {}  # directories that stages make: which stage
    checksums = Checksums(os.path.join(config.directory, CACHE))
    for stage in config.stages:
        staged = stage_config(config, stage.name)
        tokenizer = made_tokenizer(stage.command, staged, config.directory, [*makers])
        made_from = stages_read(stage.command, staged, makers)
        for directory in made_by(stage.command, staged):
            makers.setdefault(directory, stage.name)
        before = stage_runs[-1].hash if stage_runs else ""
        content = [stage.command, stage.ranks, before, dump(staged.model_copy(update={"log": LogConfig()}))]
        read = contents(stage.command, staged, [*makers], checksums)
        digest = hashlib.sha256(json.dumps([*content, read] if read else content).encode()).hexdigest()
        stage_runs.append(StageRun(stage, staged.directory, dump(staged), tokenizer, made_from, digest))
    checksums.save()
    return stage_runs


def write_list(path: str, names: list[str]) -> None:
    """Writes stages.json. Raises ValueError where something else has this name."""
    if os.path.exists(path):
        with contextlib.suppress(ValueError):
            if isinstance(_read_json(path), list):
                write_whole(path, json.dumps(names, indent=1))
                return
        raise ValueError(f"{path}: `llmtrain run` did not write this file; give the run another name, or move it away")
    write_whole(path, json.dumps(names, indent=1))


def is_done(stage_run: StageRun) -> bool:
    """Tells whether this stage, with these settings, has finished before."""
    return os.path.exists(stage_run.done) and _read_json(stage_run.done)["hash"] == stage_run.hash


def children_cpu_s() -> float:
    """Returns the CPU time of all processes of stages that have ended, their ranks among them."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run_stage(stage_run: StageRun, title: str, held: int) -> int:
    """Starts one stage, waits for it, and notes that it is done; returns its exit status."""
    set_aside_other(stage_run)
    os.makedirs(stage_run.directory, exist_ok=True)
    write_whole(stage_run.yaml, stage_run.head + stage_run.config)
    start, cpu_start, command = time.monotonic(), children_cpu_s(), stage_command(stage_run)
    status = run_child(command, child_environment(stage_run.stage.ranks), held)
    seconds = round(time.monotonic() - start, 1)
    cpu_s = round(children_cpu_s() - cpu_start + spent_before(stage_run), 1)
    if status:
        write_whole(stage_run.spent, json.dumps({"hash": stage_run.hash, "cpu_s": cpu_s}))
        _say(f"{title}: ended with status {status} after {seconds} s; its files are in {stage_run.directory}")
        _say("the same command goes on from there")
        return status
    done = {"hash": stage_run.hash, "seconds": seconds, "cpu_s": cpu_s, "made_from": stage_run.made_from}
    write_whole(stage_run.done, json.dumps({**done, "command": shlex.join(command)}, indent=1))
    _say(f"{title}: done in {seconds} s")
    return 0


def spent_before(stage_run: StageRun) -> float:
    """Returns the CPU time of attempts at this stage that did not end well; not of those whose `llmtrain run` was
    killed too."""
    found = _read_json(stage_run.spent) if os.path.exists(stage_run.spent) else {}
    return found["cpu_s"] if found.get("hash") == stage_run.hash else 0.0


def set_aside_other(stage_run: StageRun) -> None:
    """Moves away what a stage with other settings or data left there: resuming from it would mix the two, silently.

    Raises ValueError where another job is at work there, or stage.yaml is not ours.
    """
    if not os.path.exists(stage_run.yaml):
        return
    with open(stage_run.yaml, encoding="utf-8") as file:
        head = file.readline()
    if head == stage_run.head:
        return
    if not head.startswith(HEAD):
        raise ValueError(f"{stage_run.yaml}: `llmtrain run` did not write this file; give the run another name")
    with locked(stage_run.directory):
        aside = _set_aside(stage_run.directory)
    os.mkdir(os.path.realpath(stage_run.directory))  # also behind a link
    _say(f"{stage_run.directory} was made with other settings or data: kept as {aside}, starting anew")
    if stage_run.tokenizer is not None and os.path.exists(stage_run.tokenizer):
        _say(f"{stage_run.tokenizer} too: kept as {_set_aside(stage_run.tokenizer)}")


def _set_aside(directory: str) -> str:
    """Renames the directory behind all links; returns its new path."""
    place = os.path.realpath(directory)
    aside = next(p for n in itertools.count(1) if not os.path.lexists(p := f"{place}.old{n}"))
    os.rename(place, aside)
    return aside


def stage_command(stage_run: StageRun) -> list[str]:
    """Returns the command line of a stage: a plain process for one rank, torchrun for more."""
    module = ["-m", "llmtrain", stage_run.stage.command, stage_run.yaml]
    if stage_run.stage.ranks == 1:
        return [sys.executable, *module]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={stage_run.stage.ranks}"]
    return [sys.executable, *launcher, *module]


def child_environment(ranks: int) -> dict[str, str]:
    """Returns our environment, with the cores shared out to the ranks and `KEEP_FREED`, unless the user decided
    that."""
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    return {"OMP_NUM_THREADS": str(threads), **KEEP_FREED, **os.environ}


def run_child(command: list[str], environment: dict[str, str], held: int) -> int:
    """Runs a command on our terminal, in a process group of its own, which inherits the lock `held`.

    Returns its exit status, 128 + the signal if one ended it. SIGINT and SIGTERM end it: SIGTERM to its group, SIGKILL
    after GRACE_S, when torchrun has ended its workers, who live in sessions of their own. If we are killed ourselves,
    it gets SIGTERM.
    """
    parent = os.getpid()
    child = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        pass_fds=(held,),
        process_group=0,
        preexec_fn=lambda: die_with(parent),
    )
    asked: list[tuple[float, int]] = []  # when, which signal

    def stop(number: int, frame: object) -> None:
        asked.append((time.monotonic(), number))
        signal_group(child.pid, signal.SIGTERM)

    with handlers(stop):
        status = _wait(child, asked)
    if asked:
        return 128 + asked[0][1]
    return status if status >= 0 else 128 - status


def _wait(child: subprocess.Popen, asked: list[tuple[float, int]]) -> int:
    """Returns the exit status of the child, whose group is killed GRACE_S seconds after it was asked to stop."""
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return child.wait(timeout=1.0)
        if asked and time.monotonic() > asked[0][0] + GRACE_S:
            signal_group(child.pid, signal.SIGKILL)


def signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


@contextlib.contextmanager
def handlers(handler: Any) -> Iterator[None]:
    numbers = (signal.SIGTERM, signal.SIGINT)
    previous = [signal.signal(number, handler) for number in numbers]
    try:
        yield
    finally:
        for number, old in zip(numbers, previous, strict=True):
            signal.signal(number, old)


def die_with(parent: int) -> None:
    """Lets the child, in which this runs, get SIGTERM when its parent dies: else two trainers would write one directory
    after a restart."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os._exit(1)


def summarize(directory: str, stage_runs: list[StageRun]) -> None:
    """Prints the last lines: what every evaluation measured, and where the report is."""
    measured = [os.path.join(r.directory, "eval.json") for r in stage_runs if r.stage.command == "eval"]
    rows = [_read_json(path) for path in measured if os.path.exists(path)]
    shown = list(dict.fromkeys(name for row in rows for name in row if MEASURE.fullmatch(name)))
    if rows:
        table = Table("model", *shown)
        for row in rows:
            table.add_row(row["label"], *[f"{row[name]:.3f}" if name in row else "" for name in shown])
        Console().print(table)
    report = os.path.join(directory, "report", "index.html")
    if os.path.exists(report):
        _say(f"report: {report}")


def _say(line: str) -> None:
    print(line, flush=True)


def _read_json(path: str) -> Any:
    with open(path, encoding="utf-8") as file:
        return json.load(file)
