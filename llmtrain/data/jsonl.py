"""Reads and writes JSON: one object a line, or one array of objects. Errors name the file and the line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from llmtrain.data.faults import Faults

Record = tuple[str, dict[str, Any]]
"""Where a row stands (`file:line`), and the row."""


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a JSON object's members. Raises ValueError when a key is written twice: one would be lost."""
    members = dict(pairs)
    if len(members) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(k for k in keys if keys.count(k) > 1)!r} is written twice; remove one")
    return members


DECODER = json.JSONDecoder(object_pairs_hook=unique)


def fault_of(error: Exception, text: str) -> str:
    """Returns what is wrong with a text that is not JSON, in words for the user."""
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON ({error.msg}): {text.strip()[:60]!r}; fix the line"
    if isinstance(error, RecursionError):
        return "JSON that is nested too deeply to be read; flatten the row"
    return str(error).split(": ")[0] if "integer string" in str(error) else str(error)


def parse_object(text: str) -> dict[str, Any]:
    """Returns the object that a text spells. Raises ValueError, without a place, when it is no JSON object of valid
    text."""
    try:
        record = DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(fault_of(error, text)) from None
    return checked(record, text)


def checked(record: Any, text: str) -> dict[str, Any]:
    """Returns the record that `text` spells. Raises ValueError when it is no object, or holds half a character."""
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, found {kind(record)}; write a row as {{...}}")
    if "\\ud" in text or "\\uD" in text:  # only such an escape can spell half of a character
        for field, value in record.items():
            check_characters(f"{field}{json.dumps(value, ensure_ascii=False)}", f"field {field!r}")
    return record


def check_characters(text: str, what: str) -> None:
    """Raises ValueError when a text has half a character (a lone surrogate), which no tokenizer can take."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"\\u{ord(text[error.start]):04x}"
        raise ValueError(
            f"{what} has half a character ({found}, a surrogate without its partner); write the whole character"
        ) from None


def kind(value: Any) -> str:
    """Returns what JSON calls a value, for messages."""
    names = {dict: "object", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def decode(data: bytes) -> str:
    """Returns the text of UTF-8 bytes. Raises ValueError, without a place, when they are something else."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (byte {error.start}); convert it or leave it out") from None


def json_lines(data: bytes, path: str, faults: Faults) -> Iterator[Record]:
    """Yields the object of every line that is not blank; a broken one is a fault."""
    for number, line in enumerate(data.splitlines(), 1):
        if line.strip():
            try:
                yield f"{path}:{number}", parse_object(decode(line))
            except ValueError as error:
                faults.add(f"{path}:{number}", str(error))


def json_array(text: str, path: str, faults: Faults) -> Iterator[Record]:
    """Yields the objects of one array, each with the line that it begins in. Behind broken JSON nothing is read."""
    at, counted, line = _after(text, text.index("[") + 1), 0, 1
    while text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        try:
            record, end = DECODER.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            line = getattr(error, "lineno", line)
            return faults.add(f"{path}:{line}", fault_of(error, text[at : at + 60]))
        try:
            yield f"{path}:{line}", checked(record, text[at:end])
        except ValueError as error:
            faults.add(f"{path}:{line}", str(error))
        at = _after(text, end)
        if text[at : at + 1] not in (",", "]"):
            line += text.count("\n", counted, at)
            return faults.add(f"{path}:{line}", "the array is cut short or lacks a comma here; end it with `]`")
        at = _after(text, at + 1) if text[at] == "," else at
    if text[at + 1 :].strip():
        line += text.count("\n", counted, at)
        faults.add(f"{path}:{line}", "there is more behind the end of the array; remove it")


def _after(text: str, at: int) -> int:
    """Returns the place of the first character from `at` on that is no white space."""
    while text[at : at + 1] and text[at] in " \t\r\n":
        at += 1
    return at


def write_jsonl(path: str | Path, records: Iterable[dict[str, Any]]) -> None:
    """Writes one object a line, UTF-8."""
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
