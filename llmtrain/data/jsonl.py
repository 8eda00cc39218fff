"""Reads and writes JSON Lines: one JSON object a line. Errors name the file and the line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def parse_line(text: str, path: str | Path, line: int) -> dict[str, Any]:
    """Returns the object on one line (counted from 1). Raises ValueError when it is not a JSON object."""
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{line}: not valid JSON ({error.msg}): {text.strip()[:60]!r}; fix the line") from None
    if not isinstance(record, dict):
        raise ValueError(f"{path}:{line}: expected a JSON object, found {type(record).__name__}")
    return record


def read_jsonl(path: str | Path) -> list[tuple[int, dict[str, Any]]]:
    """Returns (line number, object) of every line that is not blank. Raises ValueError for a missing, empty or broken
    file."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    with open(path, encoding="utf-8") as lines:
        records = [(i, parse_line(text, path, i)) for i, text in enumerate(lines, 1) if text.strip()]
    if not records:
        raise ValueError(f"{path}: the file is empty; expected one JSON object a line")
    return records


def text_field(record: dict[str, Any], names: tuple[str, ...], where: str) -> str:
    """Returns the first of the fields `names` that is present. Raises ValueError when none is, or when it is no
    string."""
    for name in names:
        if name in record:
            if not isinstance(record[name], str):
                raise ValueError(f"{where}: field {name!r} must be a string, found {type(record[name]).__name__}")
            return record[name]
    raise ValueError(f"{where}: missing field {' or '.join(map(repr, names))}; found {', '.join(map(repr, record))}")


def write_jsonl(path: str | Path, records: Iterable[dict[str, Any]]) -> None:
    """Writes one object a line, UTF-8."""
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
