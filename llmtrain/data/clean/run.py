"""Cleans the documents of `data.collect`, once: what is done is skipped, and other settings are refused."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from llmtrain.config.schema import DataConfig
from llmtrain.observe.files import write_whole

MARKER = "cleaned.json"  # written last: all documents and the report are there
BEGUN = "begun.json"  # the same, before anything else is written
REPORT_KEYS = {"path", "examples", "dry_run_documents"}  # keys of `data.clean` that documents do not depend on


def clean_dir(data: DataConfig, data_dir: str) -> str:
    """Returns the directory of cleaned documents."""
    return data.clean.path or os.path.join(data_dir, "clean")


def clean(data: DataConfig, data_dir: str) -> None:
    """Reads and cleans all inputs of `data.collect` and writes documents and a report into `clean_dir`.

    Returns at once when that was done before; a job that was killed goes on behind its finished tasks. Raises
    ValueError when an extra is missing, an input cannot be read, or the directory holds a job of other settings or
    other contents; RuntimeError for a task that fails again and again.
    """
    needed(data)
    from llmtrain.data.clean.execute import execute
    from llmtrain.data.clean.job import make_job
    from llmtrain.data.clean.report import write_report

    root = os.path.abspath(clean_dir(data, data_dir))
    os.makedirs(root, exist_ok=True)
    settings = {"settings": identity(data), "contents": contents(data)}
    if done(root, settings):
        return
    with shown() as told:
        execute(make_job(root, data.collect, data.clean, data.execution), data.executor, told)
    write_report(root, data.clean, data.collect)
    write_whole(Path(root, MARKER), json.dumps(settings, indent=1) + "\n")


def needed(data: DataConfig) -> None:
    """Raises ValueError when a package is missing."""
    wanted = {"data": "datatrove"} | ({"ray": "ray"} if data.executor == "ray" else {})
    for extra, package in wanted.items():
        if find_spec(package) is None:
            raise ValueError(f"data.collect: needs the package {package}; install it: pip install 'llmtrain[{extra}]'")


def identity(data: DataConfig) -> str:
    """Returns a hash of the settings that cleaned documents depend on."""
    clean = data.clean.model_dump(exclude=REPORT_KEYS)
    held = [[each.model_dump() for each in data.collect], clean, data.execution.tasks]
    return hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()


def contents(data: DataConfig) -> dict[str, str]:
    """Returns what tells that the files of an input are those of another time: a hash of their names, sizes and times."""
    from llmtrain.data.clean.collect import fingerprint

    return {each.name: fingerprint(each) for each in data.collect}


def done(root: str, settings: dict[str, Any]) -> bool:
    """Returns whether the documents are there. Raises ValueError when they, or a job that was begun, are from other
    settings or contents."""
    path = next((path for name in (MARKER, BEGUN) if (path := Path(root, name)).is_file()), None)
    if path is None:
        write_whole(Path(root, BEGUN), json.dumps(settings, indent=1) + "\n")
        return False
    was = json.loads(path.read_text())
    remedy = f"give another data.clean.path (or data.path), or delete {root}"
    if was["settings"] != settings["settings"]:
        raise ValueError(
            f"{root} was cleaned with other settings of data.collect, data.clean or data.execution; {remedy}"
        )
    if changed := [name for name, seen in was["contents"].items() if settings["contents"].get(name) != seen]:
        raise ValueError(f"{root} was cleaned from other contents of {', '.join(changed)}; {remedy}")
    return path.name == MARKER


@contextmanager
def shown() -> Iterator[Any]:
    """Yields a function that shows how far each phase is."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    rows: dict[str, TaskID] = {}
    with Progress(*columns, console=Console(stderr=True)) as progress:

        def told(phase: str, finished: int, tasks: int) -> None:
            if phase not in rows:
                rows[phase] = progress.add_task(phase, total=tasks)
            progress.update(rows[phase], completed=finished)

        yield told
