"""Reads files of rows: JSON lines, JSON arrays, CSV, Parquet, Arrow."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

from llmtrain.config.clean import CollectConfig
from llmtrain.config.clean.collect import kind_of
from llmtrain.data.clean.read.apart import Apart
from llmtrain.data.clean.read.fields import COLUMNS, found
from llmtrain.data.clean.read.items import BrokenError, Item, Skipped, UnusableError
from llmtrain.data.clean.read.stream import PIECE_BYTES, bounded_lines, local_path, open_bytes, open_source, whole
from llmtrain.data.clean.read.text import decode
from llmtrain.data.faults import Faults
from llmtrain.data.jsonl import json_array

MAX_VALUES = 5_000_000  # of a row: more would take gigabytes as Python objects
LINE_BYTES = 100  # what Python holds for a line, beside its bytes
BOM = b"\xef\xbb\xbf"


def row_file(path: str, config: CollectConfig, apart: Apart) -> Iterator[Item]:
    """Yields the rows of a file, whose form follows from its ending; without a known one it is JSON lines."""
    bare = bare_name(path)
    if bare.endswith(".parquet"):
        return parquet_file(path, config, apart)
    if bare.endswith(".arrow"):
        return table("tables:arrow", path, config, apart)  # `save_to_disk` writes it uncompressed
    return csv_file(path, config, apart) if bare.endswith((".csv", ".tsv")) else json_file(path, config, apart)


def bare_name(path: str) -> str:
    """Returns the path in lower case, without the ending of a compression."""
    return path.removesuffix(".gz").removesuffix(".zst").lower()


def json_file(path: str, config: CollectConfig, _: Apart) -> Iterator[Item]:
    """Yields the rows of JSON lines, or of one array in a `.json` file if it is no larger than max_bytes."""
    with open_bytes(path, config) as stream:
        if bare_name(path).endswith(".json") and stream.peek(1).removeprefix(BOM).lstrip()[:1] == b"[":
            yield from array_rows(path, config)
            return
        for number, line in bounded_lines(stream, config.max_bytes):
            if line is None:
                yield Skipped(number, "too_large")
            elif line.strip():
                yield json_row(line.removeprefix(BOM) if number == 1 else line, number, config)


def array_rows(path: str, config: CollectConfig) -> Iterator[Item]:
    """Yields the rows of a JSON array; behind a broken one nothing can be read."""
    data = whole(path, config)
    refuse_many(data, b",[{")
    text, notes = decode(data)
    faults, seen, number = Faults(path), 0, 0
    for number, (_, record) in enumerate(json_array(text, path, faults), 1):
        yield found(record, number + faults.count, config, notes)
        if faults.count > seen:
            yield from (Skipped(None, "json_broken") for _ in range(faults.count - seen))
            seen = faults.count
    yield from (Skipped(None, "json_broken") for _ in range(faults.count - seen))


def json_row(line: bytes, number: int, config: CollectConfig) -> Item:
    """Returns the document of a line of JSON, or why there is none."""
    try:
        refuse_many(line, b",[{")
        record, notes = parsed(line)
    except UnusableError as error:
        return Skipped(number, str(error))
    return found(record, number, config, notes) if isinstance(record, dict) else Skipped(number, "not_an_object")


def parsed(line: bytes) -> tuple[Any, tuple[str, ...]]:
    """Returns (value, notes) of JSON. What orjson refuses but others write is read too: NaN, control characters and
    half characters in texts, bytes that are not UTF-8."""
    import orjson

    try:
        return orjson.loads(line), ()
    except orjson.JSONDecodeError:
        text, notes = decode(line)
    try:
        return json.loads(text, strict=False), notes
    except RecursionError:
        raise UnusableError("too_deep") from None
    except ValueError:
        raise UnusableError("json_broken") from None


def refuse_many(data: bytes, marks: bytes) -> None:
    """Raises UnusableError when a row has so many values that they would fill the memory."""
    if len(data) > MAX_VALUES and sum(data.count(mark) for mark in marks) > MAX_VALUES:
        raise UnusableError("too_many_values")


def csv_file(path: str, config: CollectConfig, _: Apart) -> Iterator[Item]:
    """Yields the rows of a CSV file, whose first row names the fields."""
    csv.field_size_limit(max(csv.field_size_limit(), config.max_bytes))
    delimiter = "\t" if bare_name(path).endswith(".tsv") else ","
    names: list[str] | None = None
    with open_bytes(path, config) as stream:
        for number, piece in csv_pieces(stream, config.max_bytes):
            try:
                values, notes = csv_values(piece, delimiter)
            except UnusableError as error:
                yield Skipped(number, str(error))
                continue
            for i, row in enumerate(values):
                if names is None:
                    names = header(row, config)
                elif len(row) != len(names):
                    yield Skipped(number + i, "csv_fields")
                else:
                    yield found(dict(zip(names, row, strict=True)), number + i, config, notes)


def header(names: list[str], config: CollectConfig) -> list[str]:
    """Returns the names of the fields. Raises BrokenError when they cannot be used."""
    names = [name.removeprefix("\ufeff") for name in names]
    if len(set(names)) < len(names):
        raise BrokenError("csv_header")
    if config.type == "csv" and config.field not in names:
        raise BrokenError("no_field")
    return names


def csv_pieces(stream: io.BufferedReader, max_bytes: int) -> Iterator[tuple[int, bytes | None]]:
    """Yields (number of the first line, lines of a row): as many as it takes for its quotes to be even. Where they are
    not within max_bytes, a quote was never ended, and every line is a row by itself."""
    held: list[tuple[int, bytes]] = []
    held_bytes = 0
    for number, line in bounded_lines(stream, max_bytes):
        if line is None:
            yield from held
            held, held_bytes = [], 0
            yield number, None
            continue
        if not held and line in (b"\n", b"\r\n"):
            continue  # a bomb can hold millions of them
        held.append((number, line))
        held_bytes += len(line) + LINE_BYTES
        if line.count(b'"') % 2 == (len(held) > 1):
            yield held[0][0], b"".join(line for _, line in held)
            held, held_bytes = [], 0
        elif held_bytes > max_bytes:
            yield from held
            held, held_bytes = [], 0
    yield from held


def csv_values(piece: bytes | None, delimiter: str) -> tuple[list[list[str]], tuple[str, ...]]:
    """Returns (rows, notes) of some lines. Raises UnusableError when they are too long or no CSV."""
    if piece is None:
        raise UnusableError("too_large")
    refuse_many(piece, delimiter.encode())
    text, notes = decode(piece)
    try:
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        return [row for row in rows if row], notes
    except csv.Error:
        raise UnusableError("csv_quote") from None


def parquet_file(path: str, config: CollectConfig, apart: Apart) -> Iterator[Item]:
    """Yields the rows of a Parquet file, of a temporary copy where it is compressed or in another place."""
    local = local_path(path)
    if local is not None and not local.endswith((".gz", ".zst")):
        open_source(local).close()  # refuses what is no regular file
        yield from table("tables:parquet", local, config, apart)
        return
    with copied(path, config) as copy:
        yield from table("tables:parquet", copy, config, apart)


def table(function: str, path: str, config: CollectConfig, apart: Apart) -> Iterator[Item]:
    """Yields the rows of a table that a process with limits reads."""
    columns = None if kind_of(config) == "dialogue" else [config.field, *COLUMNS]
    if columns and config.id_field:
        columns.append(config.id_field)
    with closing(apart.items(function, path, columns)) as rows:
        for number, record in rows:
            yield found(record, number, config)


@contextmanager
def copied(path: str, config: CollectConfig) -> Iterator[str]:
    """Gives the path of a copy, decompressed, that is removed behind it. Raises BrokenError when it would be larger
    than max_copy_bytes."""
    with tempfile.NamedTemporaryFile(suffix=".parquet") as copy, open_bytes(path, config) as stream:
        while piece := stream.read(PIECE_BYTES):
            if copy.tell() + len(piece) > config.max_copy_bytes:
                raise BrokenError("too_large")
            copy.write(piece)
        copy.flush()
        yield copy.name
