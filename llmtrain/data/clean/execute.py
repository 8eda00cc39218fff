"""Runs the phases of a cleaning job: here in processes, as arrays of Slurm, or as tasks of Ray.

A task is a command, `python -m llmtrain.data.clean.task ROOT PHASE RANK`, the same everywhere; no object is pickled.
A task that is done is marked and never redone; one whose process died is started again.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from llmtrain.data.clean.job import Job, phases
from llmtrain.data.clean.phases import Phase
from llmtrain.data.clean.task import PARENT, PENDING, logs, pending, run_task
from llmtrain.observe.files import write_whole

if TYPE_CHECKING:
    from datatrove.executor.slurm import SlurmPipelineExecutor

Told = Callable[[str, int, int], None]
"""Is told the name of a phase, and how many of its tasks are done, of how many."""
Running = dict[int, subprocess.Popen]
"""Holds the processes of tasks by their numbers."""

POLL_S = 0.05
CONNECT_S = 10.0  # for a cluster to answer
SAID_CHARS = 600  # of what a task wrote before it failed


def execute(job: Job, executor: str, told: Told) -> None:
    """Runs all phases of a job with `local`, `slurm` or `ray`; returns when all are done. Raises RuntimeError, which
    names the task and its log, for one that fails again and again."""
    job.write()
    {"local": run_local, "slurm": run_slurm, "ray": run_ray}[executor](job, told)


def command(root: str, phase: str, *rank: int) -> list[str]:
    """Returns the command of a task; of a Slurm array without its number."""
    return [sys.executable, "-m", "llmtrain.data.clean.task", root, phase, *map(str, rank)]


def run_local(job: Job, told: Told) -> None:
    """Runs all phases on this machine, `execution.workers` tasks at a time; one worker is this process."""
    for name, left, tasks in unfinished(job, told):
        if job.execution.workers == 1:
            run_here(job, name, left, tasks, told)
        else:
            run_processes(job, name, left, tasks, told)


def unfinished(job: Job, told: Told) -> Iterator[tuple[str, list[int], int]]:
    """Yields the name, the tasks that are not done and the number of tasks of each phase that is not done."""
    for phase in phases(job):
        left = pending(job.root, phase)
        told(phase.name, phase.tasks - len(left), phase.tasks)
        if left:
            yield phase.name, left, phase.tasks


def run_here(job: Job, name: str, ranks: list[int], tasks: int, told: Told) -> None:
    """Runs tasks in this process, one after the other, each with counts of its own. Raises ValueError for what a task
    tells the user, RuntimeError for any other failure, whose traceback is in the task's log."""
    for done, rank in enumerate(ranks, tasks - len(ranks) + 1):
        try:
            run_task(job.root, named(job, name), rank)
        except ValueError:
            raise
        except Exception as error:
            what = f"{type(error).__name__}: {' '.join(str(error).split())[-SAID_CHARS:]}"
            raise RuntimeError(
                f"{name}: task {rank} failed ({what}); its log is {log_of(job.root, name, rank)}, started again the "
                "command goes on with it"
            ) from None
        told(name, done, tasks)


def log_of(root: str, phase: str, rank: int) -> str:
    """Returns the file that a task logs to."""
    return f"{logs(root, phase)}/logs/task_{rank:05d}.log"


def named(job: Job, name: str) -> Phase:
    """Returns the phase of a name, made anew."""
    return next(phase for phase in phases(job) if phase.name == name)


def run_processes(job: Job, name: str, ranks: list[int], tasks: int, told: Told) -> None:
    """Runs tasks in processes. One that dies is started again behind the others; at an error all others are ended."""
    waiting, tries, running, done = list(ranks), dict.fromkeys(ranks, 0), Running(), 0
    with ended(running):
        while waiting or running:
            while waiting and len(running) < job.execution.workers:
                rank = waiting.pop(0)
                running[rank] = start(job.root, name, rank)
            rank, status = first_to_end(running)
            if status == 0:
                done += 1
                told(name, tasks - len(ranks) + done, tasks)
                continue
            tries[rank] += 1
            if tries[rank] > job.execution.retries:
                raise RuntimeError(failure(job.root, name, rank, status, tries[rank]))
            waiting.append(rank)


def said(root: str, phase: str, rank: int) -> Path:
    """Returns the file of what the process of a task writes to its standard error."""
    return Path(logs(root, phase), "errors", f"{rank:05d}.txt")


def start(root: str, phase: str, rank: int) -> subprocess.Popen:
    """Starts the process of a task, which ends when this one does."""
    path = said(root, phase, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as errors:
        environment = os.environ | {PARENT: str(os.getpid())}
        return subprocess.Popen(command(root, phase, rank), stderr=errors, stdin=subprocess.DEVNULL, env=environment)


def first_to_end(running: Running) -> tuple[int, int]:
    """Waits until a process ends, and takes it out. Returns its task and exit status."""
    while True:
        for rank, process in running.items():
            if (status := process.poll()) is not None:
                del running[rank]
                return rank, status
        time.sleep(POLL_S)


@contextmanager
def ended(running: Running) -> Iterator[None]:
    """Ends the processes that still run when the block is left."""
    try:
        yield
    finally:
        for process in running.values():
            process.kill()
            process.wait()


def failure(root: str, phase: str, rank: int, status: int, tries: int) -> str:
    """Returns what is told of a task that failed."""
    how = f"ended by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
    last = said(root, phase, rank).read_text(errors="replace").strip()[-SAID_CHARS:]
    return (
        f"{phase}: task {rank} failed {tries} times ({how}); its log is {log_of(root, phase, rank)}, "
        f"started again the command goes on with it; its last words: {last or 'none'}"
    )


def run_slurm(job: Job, told: Told) -> None:
    """Submits an array for each phase, each behind the one before, and waits for the last. Raises RuntimeError when
    tasks are left: the same command goes on with them."""
    left = list(unfinished(job, told))
    before = None
    for name, ranks, _ in left:
        before = submit(job, name, ranks, before, wait=name == left[-1][0])
    for phase in phases(job):
        if ranks := pending(job.root, phase):
            raise RuntimeError(
                f"{phase.name}: {len(ranks)} of {phase.tasks} tasks are not done; their logs are in "
                f"{logs(job.root, phase.name)}; started again the command goes on with them"
            )
        told(phase.name, phase.tasks, phase.tasks)


def submit(job: Job, name: str, ranks: list[int], before: str | None, wait: bool) -> str:
    """Submits the tasks of a phase as one or more arrays; returns the number of the last job."""
    folder = logs(job.root, name)
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_whole(Path(folder, PENDING), json.dumps(ranks))
    slurm = slurm_executor(job, name, len(ranks), before)
    size = min(len(ranks), slurm.max_array_size if slurm.max_array_size != -1 else len(ranks))
    script = slurm.get_launch_file_contents(slurm.get_sbatch_args(size), shlex.join(command(job.root, name)))
    for first in range(0, len(ranks), size):
        last = first + size >= len(ranks)
        more = [f"--export=ALL,RUN_OFFSET={first}", "--kill-on-invalid-dep=yes", *(["--wait"] if wait and last else [])]
        after = [f"--dependency={slurm.dependency}"] if slurm.dependency else []
        slurm.job_id = sbatch(script, slurm, [*more, *after], wait and last)
    return slurm.job_id


def slurm_executor(job: Job, name: str, tasks: int, before: str | None) -> SlurmPipelineExecutor:
    """Returns datatrove's executor, which writes scripts. Raises ValueError for a setting that it does not know."""
    from datatrove.executor.slurm import SlurmPipelineExecutor

    settings = {"job_name": name, "tasks": tasks, "workers": job.execution.workers} | job.execution.slurm
    try:
        return SlurmPipelineExecutor([], logging_dir=logs(job.root, name), depends_job_id=before, **settings)
    except TypeError as error:
        raise ValueError(f"data.execution.slurm: {error}; name what datatrove's Slurm executor takes") from None


def sbatch(script: str, slurm: SlurmPipelineExecutor, arguments: list[str], waits: bool) -> str:
    """Submits a script and returns the job's number. Raises RuntimeError when Slurm takes none; one that is waited for
    ends with the status of its tasks, which are looked at afterwards."""
    from datatrove.executor.slurm import launch_slurm_job

    try:
        return launch_slurm_job(script, slurm.job_id_retriever, *arguments)
    except subprocess.CalledProcessError as error:
        if waits and error.output:  # it was submitted
            return slurm.job_id_retriever(error.output.decode())
        raise RuntimeError(f"sbatch took no job (exit status {error.returncode}): {error.output.decode()}") from None


def run_ray(job: Job, told: Told) -> None:
    """Runs the tasks of each phase on a Ray cluster, whose machines share this file system."""
    import ray

    refuse_unreachable(job.execution.ray_address)
    ray.init(address=job.execution.ray_address, log_to_driver=False, include_dashboard=False)
    try:
        remote = ray.remote(max_retries=job.execution.retries, retry_exceptions=True)(run_command)
        for name, left, tasks in unfinished(job, told):
            running = [remote.options(name=f"{name}-{rank}").remote(command(job.root, name, rank)) for rank in left]
            for done in range(len(left)):
                ended_task, running = ray.wait(running)
                ray.get(ended_task)
                told(name, tasks - len(left) + done + 1, tasks)
    except ray.exceptions.RayError as error:
        raise RuntimeError(f"a task failed on Ray: {' '.join(str(error).split())[-SAID_CHARS:]}") from None
    finally:
        ray.shutdown()


def refuse_unreachable(address: str | None) -> None:
    """Raises ValueError when nothing listens at the address of a cluster, for which Ray waits for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not (host and port.isdecimal()):
        return  # none, or "auto"
    try:
        socket.create_connection((host, int(port)), CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"data.execution.ray_address={address}: nothing answers there ({error}); start the cluster, or correct it"
        ) from None


def run_command(words: list[str]) -> None:
    """Runs a command on a machine of the cluster. Raises RuntimeError with its last words when it fails."""
    done = subprocess.run(words, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, errors="replace")
    if done.returncode:
        raise RuntimeError(f"{shlex.join(words)}: exit status {done.returncode}: {done.stderr[-600:]}")
