"""Writes directories of rows that a model made, which a later command may replace."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmtrain.observe.locks import locked
from llmtrain.observe.owned import filling, is_run


@contextmanager
def own_directory(directory: str, command: str, files: tuple[str, ...]) -> Iterator[Path]:
    """Yields a directory to write `files` into, which take their places in `directory` when the block ends well.

    Meanwhile the directory is locked. Raises ValueError when it holds a run that trains, another job is at work there,
    or one of the files is there and not ours.
    """
    if is_run(directory):
        raise ValueError(f"{directory}: holds a run that trains; give `{command}` another name or run_dir")
    with locked(directory), filling(directory, command, files) as place:
        yield place


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes one JSON object a line."""
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
