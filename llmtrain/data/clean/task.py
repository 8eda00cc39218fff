"""Runs one task of a cleaning job: `python -m llmtrain.data.clean.task ROOT PHASE RANK`.

A Slurm array leaves RANK out: its tasks are the numbers in the phase's `ranks_to_run.json`, by SLURM_ARRAY_TASK_ID.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stderr
from pathlib import Path
from threading import Thread

from datatrove.executor import LocalPipelineExecutor
from loguru import logger

from llmtrain.data.clean.job import phases, read_job
from llmtrain.data.clean.phases import Phase

PENDING = "ranks_to_run.json"
PARENT = "LLMTRAIN_CLEAN_PARENT"  # the number of the process without which a task must not go on


def logs(root: str, phase: str) -> str:
    """Returns the folder of a phase's logs, counts and marks of finished tasks."""
    return f"{root}/logs/{phase}"


def executor(root: str, phase: Phase) -> LocalPipelineExecutor:
    """Returns datatrove's executor of a phase, which runs and marks its tasks."""
    return LocalPipelineExecutor(phase.steps, tasks=phase.tasks, workers=1, logging_dir=logs(root, phase.name))


def pending(root: str, phase: Phase) -> list[int]:
    """Returns the numbers of the tasks that are not done."""
    return executor(root, phase).get_incomplete_ranks()


def run_task(root: str, phase: Phase, rank: int) -> None:
    """Runs a task, unless it is done, and marks it as done. What a killed one left is written anew."""
    try:
        with open(os.devnull, "w") as nothing, redirect_stderr(nothing):  # all goes to the task's own log
            executor(root, phase)._run_for_rank(rank, local_rank=1)
    finally:
        logger.remove()  # datatrove has set up what writes to standard error again


def main(arguments: Sequence[str]) -> None:
    """Runs the task that the command line names."""
    root, name, *rest = arguments
    if parent := os.environ.get(PARENT):
        Thread(target=end_with, args=(int(parent),), daemon=True).start()
    phase = in_turn(root, name)
    for rank in map(int, rest) if rest else array_ranks(root, name):
        run_task(root, phase, rank)


def in_turn(root: str, name: str) -> Phase:
    """Returns the phase of a name. Raises RuntimeError while tasks of one before it are not done: Slurm lets an array
    run behind one of which a task failed, where an array is cut into several."""
    for phase in phases(read_job(root)):
        if phase.name == name:
            return phase
        if left := pending(root, phase):
            raise RuntimeError(f"{name}: waits for {phase.name}, of which {len(left)} tasks are not done")
    raise RuntimeError(f"{name}: is no phase of {root}")


def end_with(parent: int) -> None:
    """Ends this process when the one that started it is gone."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def array_ranks(root: str, phase: str) -> list[int]:
    """Returns the task of a member of a Slurm array, in a list that is empty where there are fewer tasks."""
    at = int(os.environ["SLURM_ARRAY_TASK_ID"]) + int(os.environ.get("RUN_OFFSET", 0))
    return json.loads(Path(logs(root, phase), PENDING).read_text())[at : at + 1]


if __name__ == "__main__":
    main(sys.argv[1:])
