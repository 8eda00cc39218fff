"""Reads rows from files of any usual form: JSON, Parquet, CSV, compressed ones, directories, data sets of the hub."""

from __future__ import annotations

import csv
import gzip
import io
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain.config.rows import COMPRESSIONS, FORMATS, dangling, is_hub_name, matches, split_path, there
from llmtrain.data.faults import Faults
from llmtrain.data.jsonl import Record, decode, json_array, json_lines

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

SPLIT_WORD = re.compile(r"(?<![a-z])(train|test|validation|valid|val|dev|eval)(?![a-z])")
SAVED = ("dataset_dict.json", "state.json")  # what `save_to_disk` of datasets writes into its directory
MARKS = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst"}  # first bytes of a compressed file
WIDE_TEXT = {  # byte order marks; that of UTF-32 begins with one of UTF-16
    b"\xff\xfe\0\0": "utf-32",
    b"\0\0\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
PACKED_BYTES = 2**14  # unpacked at a time
BOM = b"\xef\xbb\xbf"


def read_rows(path: str, faults: Faults) -> list[Record]:
    """Returns (`file:line`, row) of every row at `path`: a file, a directory, a glob, or a data set of the hub, with
    `:SPLIT` or `:CONFIGURATION:SPLIT` behind it where it has several.

    Broken rows go to `faults`. Raises ValueError when there is nothing at the path, or no row in it.
    """
    name, parts = split_path(path)
    if is_hub_name(name):
        rows = list(hub_rows(name, parts))
    elif os.path.isdir(name) and any(os.path.isfile(os.path.join(name, mark)) for mark in SAVED):
        rows = list(saved_rows(name, parts))
    else:
        rows = [row for file in files_at(name, parts) for row in file_rows(file, faults)]
    if not rows and not faults.count:
        raise ValueError(f"{path}: the file is empty; expected rows, such as one JSON object a line")
    return rows


def files_at(name: str, parts: tuple[str, ...]) -> list[str]:
    """Returns the files that a path means: itself, those of a known form below a directory, or the matches of a glob.

    Raises ValueError when there is none, and when the files of a directory are of several splits and none is named.
    """
    if not there(name):
        raise ValueError(f"{name}: no such file; give the path of a file of rows, or owner/name of a data set")
    for path in [] if os.path.exists(name) else matches(name):
        if fault := dangling(path):
            raise ValueError(f"{path}: {fault}")
    if not os.path.isdir(name):
        return [name] if os.path.exists(name) else [path for path in matches(name) if os.path.isfile(path)]
    below = (str(p) for p in sorted(Path(name).rglob("*")) if p.is_file() and not hidden(p.relative_to(name)))
    files = [p for p in below if p.removesuffix(".gz").removesuffix(".zst").endswith(FORMATS)]
    splits = {split_of(os.path.relpath(file, name)) for file in files}
    if parts or len(splits) > 1:
        chosen = one_of(splits - {None}, parts[-1:], name)
        files = [file for file in files if split_of(os.path.relpath(file, name)) == chosen]
    if not files:
        raise ValueError(f"{name}: no file of rows in this directory; it needs one of {', '.join(FORMATS)}")
    return files


def hidden(path: Path) -> bool:
    """Returns whether a file, or a folder that it is in, has a name that begins with a dot: copies that an editor, a
    notebook or a file system keeps, and nobody means."""
    return any(part.startswith(".") for part in path.parts)


def split_of(file: str) -> str | None:
    """Returns the split that the name of a file says, as `data/train-00000.parquet` says train."""
    found = SPLIT_WORD.findall(file.lower())
    return found[-1] if found else None


def one_of(splits: Iterable[str], wanted: tuple[str, ...], name: str) -> str:
    """Returns the split that is wanted. Raises ValueError when it is none of `splits`, or there are several and none is
    named."""
    known = sorted(splits)
    if len(known) == 1 and not wanted:
        return known[0]
    if wanted and wanted[0] in known:
        return wanted[0]
    asked = f"has no split {wanted[0]!r}" if wanted else "has several splits"
    raise ValueError(f"{name}: {asked}; give one of them behind a colon, as {name}:SPLIT: {', '.join(known) or 'none'}")


def read_bytes(path: str) -> bytes:
    """Returns the content of a file, decompressed, without a byte order mark. Raises ValueError when it cannot be read,
    or is UTF-16 or UTF-32."""
    if not os.path.isfile(path):
        raise ValueError(f"{path}: not a file; give the path of a file")
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}; give a file that can be read") from None
    marked = next((name for mark, name in MARKS.items() if data.startswith(mark)), None)
    if marked is not None or path.endswith(COMPRESSIONS):
        data = decompress(data, marked or os.path.splitext(path)[1], path)
    if wide := next((name for mark, name in WIDE_TEXT.items() if data.startswith(mark)), None):
        raise ValueError(f"{path}:1: not UTF-8 text but {wide.upper()}; convert it with `iconv -f {wide} -t utf-8`")
    return data.removeprefix(BOM)


def decompress(data: bytes, form: str, path: str) -> bytes:
    """Returns the bytes that a gzip or Zstandard file holds. Raises ValueError when it is broken."""
    try:
        return gzip.decompress(data) if form == ".gz" else unpack_zstandard(data)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a whole {form} file ({error}); write it again") from None


def unpack_zstandard(data: bytes) -> bytes:
    """Returns the content of Zstandard frames. Raises EOFError when they are broken or cut short."""
    import zstandard

    content = []
    while data:
        unpacker = zstandard.ZstdDecompressor().decompressobj()
        try:
            content.append(unpacker.decompress(data))
        except zstandard.ZstdError as error:
            raise EOFError(str(error)) from None
        if not unpacker.eof:
            raise EOFError("cut short")
        data = unpacker.unused_data
    return b"".join(content)


def unpacked_lines(path: str) -> Iterator[bytes]:
    """Yields the lines of a Zstandard file, one in memory at a time. Raises ValueError when it is broken or cut
    short."""
    import zstandard

    rest: list[bytes] = []  # of a line; joined once, as a line may be long
    unpacker = None
    with open(path, "rb") as file:
        while packed := file.read(PACKED_BYTES):
            while packed:
                unpacker = unpacker or zstandard.ZstdDecompressor().decompressobj()
                try:
                    *lines, last = unpacker.decompress(packed).split(b"\n")
                except zstandard.ZstdError as error:
                    raise ValueError(f"{path}: not a whole .zst file ({error}); write it again") from None
                for line in lines:
                    yield b"".join((*rest, line))
                    rest = []
                rest.append(last)
                packed = unpacker.unused_data
                unpacker = None if unpacker.eof else unpacker
    if unpacker is not None:
        raise ValueError(f"{path}: not a whole .zst file (cut short); write it again")
    if any(rest):
        yield b"".join(rest)


def file_rows(path: str, faults: Faults) -> Iterator[Record]:
    """Yields the rows of one file. Its form follows from its ending; others are told by their first bytes."""
    bare = path.removesuffix(".gz").removesuffix(".zst")
    data = read_bytes(path)
    if bare.endswith(".parquet") or data.startswith(b"PAR1"):
        return parquet_rows(data, path)
    if bare.endswith((".csv", ".tsv")):
        return csv_rows(data, path, "\t" if bare.endswith(".tsv") else ",", faults)
    if not bare.endswith((".jsonl", ".ndjson")) and data.lstrip()[:1] == b"[":
        return json_array(text_of(data, path), path, faults)
    return json_lines(data, path, faults)


def text_of(data: bytes, path: str) -> str:
    """Returns the text of a file. Raises ValueError, with the line, when it is not UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: not UTF-8 text (byte {error.start}); convert it or leave it out") from None


def csv_rows(data: bytes, path: str, delimiter: str, faults: Faults) -> Iterator[Record]:
    """Yields the rows of a CSV file, whose first line names the fields; every value is a text."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text_of(data, path), newline=""), delimiter=delimiter, strict=True)
    names, line = next(reader, []), reader.line_num
    if len(set(names)) < len(names):
        return faults.add(f"{path}:1", f"a field is named twice in {names}; rename one")
    try:
        for values in reader:
            where, line = f"{path}:{line + 1}", reader.line_num
            if values and len(values) != len(names):
                faults.add(where, f"{len(values)} values for the {len(names)} fields of the first line; quote commas")
            elif values:
                yield where, dict(zip(names, values, strict=True))
    except csv.Error as error:
        faults.add(f"{path}:{line + 1}", f"not valid CSV ({error}); quote the value, or end the quote")


def parquet_rows(data: bytes, path: str) -> Iterator[Record]:
    """Yields the rows of a Parquet file, counted from 1. Raises ValueError when it is broken."""
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(pyarrow.BufferReader(data)).to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: cannot be read as Parquet ({reason}); write it again") from None
    return numbered(rows, path)


def numbered(rows: Iterable[dict[str, Any]], name: str) -> Iterator[Record]:
    """Yields (`name:number`, row), counted from 1. A null in a table means that the row has no such field."""
    for number, row in enumerate(rows, 1):
        yield f"{name}:{number}", {field: value for field, value in row.items() if value is not None}


def saved_rows(directory: str, parts: tuple[str, ...]) -> Iterator[Record]:
    """Yields the rows of a directory that `save_to_disk` of datasets wrote."""
    import datasets

    loaded: Dataset | DatasetDict = datasets.load_from_disk(directory)
    if isinstance(loaded, datasets.DatasetDict):
        loaded = loaded[one_of(loaded, parts[-1:], directory)]
    return numbered(loaded.to_list(), directory)


def hub_rows(name: str, parts: tuple[str, ...]) -> Iterator[Record]:
    """Yields the rows of a data set of the hub, downloaded once. Raises ValueError when it cannot be had."""
    import datasets

    configuration = parts[0] if len(parts) > 1 else None
    try:
        loaded: DatasetDict = datasets.load_dataset(name, configuration)
    except Exception as error:  # whatever the hub client, the network and the loaders raise
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{name}: no such file, and as a data set of the Hugging Face hub it cannot be loaded ({reason}); give a "
            "file, or owner/name[:CONFIGURATION]:SPLIT where the hub can be reached and HF_HUB_OFFLINE is not set"
        ) from None
    return numbered(loaded[one_of(loaded, parts[-1:], name)].to_list(), name)


def read_text(path: str) -> str:
    """Returns the text of one file. Raises ValueError when it is not UTF-8."""
    try:
        return decode(read_bytes(path))
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(path) else f"{path}: {error}") from None
