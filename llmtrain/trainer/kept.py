"""Keeps in the run directory what took long to compute, with what it was made from."""

from __future__ import annotations

import json
import os
from typing import Any

from llmtrain.checkpoint.group import together
from llmtrain.observe.files import write_whole
from llmtrain.trainer.job import Job


def path_of(job: Job, name: str) -> str:
    """Returns where a file of this name lies."""
    return os.path.join(job.config.directory, name)


def recall(job: Job, name: str, made_from: dict[str, Any], key: str) -> Any:
    """Returns the JSON value that the first rank finds in the file under `key`, None if there is none, or it was made
    from something else (a collective)."""

    def read() -> Any:
        if job.mesh.rank or not os.path.isfile(path_of(job, name)):
            return None
        with open(path_of(job, name), encoding="utf-8") as file:
            try:
                held = json.load(file)
                return held[key] if held["made_from"] == made_from else None
            except (ValueError, KeyError, TypeError):
                return None  # cut short by a full disk, or another's file: computed again

    return together(job.mesh, read)[0]


def keep(job: Job, name: str, made_from: dict[str, Any], **values: Any) -> None:
    """Writes JSON values by their keys, on the first rank (a collective)."""

    def write() -> None:
        if job.mesh.rank == 0:
            write_whole(path_of(job, name), json.dumps({"made_from": made_from, **values}) + "\n")

    together(job.mesh, write)
