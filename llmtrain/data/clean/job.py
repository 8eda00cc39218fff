"""Describes a cleaning job: what is read, how it is cleaned, and the phases that follow from it.

The description is one file of JSON, from which every process makes the same phases, on this machine or another: a task
is known by the job's directory, the name of its phase and its number.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from llmtrain.config.clean import CleanConfig, CollectConfig, ExecutionConfig
from llmtrain.config.clean.collect import kind_of
from llmtrain.data.clean.chain import chain
from llmtrain.data.clean.collect import Collect, task_count
from llmtrain.data.clean.dedup.phases import dedup_phases
from llmtrain.data.clean.files import RankWriter
from llmtrain.data.clean.phases import Phase
from llmtrain.observe.files import write_whole

DESCRIPTION = "job.json"
TASKS_A_PARTITION = 4  # comparing keys costs a fraction of cleaning


@dataclass(frozen=True)
class Job:
    """Holds a cleaning job. `root` is its directory, `tasks` the number of parts that each input is cut into."""

    root: str
    inputs: list[CollectConfig]
    clean: CleanConfig
    execution: ExecutionConfig
    tasks: dict[str, int]

    def write(self) -> None:
        """Writes the description into the job's directory."""
        held = {
            "inputs": [each.model_dump() for each in self.inputs],
            "clean": self.clean.model_dump(),
            "execution": self.execution.model_dump(),
            "tasks": self.tasks,
        }
        write_whole(Path(self.root, DESCRIPTION), json.dumps(held, indent=1) + "\n")


def make_job(root: str, inputs: list[CollectConfig], clean: CleanConfig, execution: ExecutionConfig) -> Job:
    """Returns a job whose inputs are cut into `execution.tasks` parts, at most one a file."""
    tasks = {each.name: min(execution.tasks, task_count(each)) for each in inputs}
    return Job(root, inputs, clean, execution, tasks)


def read_job(root: str) -> Job:
    """Returns the job whose description lies in a directory."""
    held = json.loads(Path(root, DESCRIPTION).read_text())
    inputs = [CollectConfig(**each) for each in held["inputs"]]
    return Job(root, inputs, CleanConfig(**held["clean"]), ExecutionConfig(**held["execution"]), held["tasks"])


def phases(job: Job) -> list[Phase]:
    """Returns what runs one after the other: each input is read and cleaned, then duplicates are dropped over all."""
    cleaned = [cleaning(job, each) for each in job.inputs]
    if job.clean.dedup is None:
        return cleaned
    partitions, examples = -(-job.execution.tasks // TASKS_A_PARTITION), job.clean.examples
    return [*cleaned, *dedup_phases(job.clean.dedup, job.inputs, job.root, job.tasks, partitions, examples)]


def cleaning(job: Job, source: CollectConfig) -> Phase:
    """Returns the phase that reads and cleans one input."""
    dropped = f"{job.root}/dropped/{source.name}"
    kept = "documents" if job.clean.dedup is None else "cleaned"
    steps = [
        Collect(source, RankWriter(f"{dropped}/collect"), job.clean.examples),
        *chain(job.clean, kind_of(source), dropped),
        RankWriter(f"{job.root}/{kept}/{source.name}"),
    ]
    return Phase(f"clean-{source.name}", steps, job.tasks[source.name])
