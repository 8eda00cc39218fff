"""Reads the documents of one source, in an order that depends only on the seed."""

from __future__ import annotations

import glob
import os
import random
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from llmtrain.config.rows import matches
from llmtrain.config.schema import SourceConfig
from llmtrain.data.arithmetic import arithmetic_documents
from llmtrain.data.faults import Faults
from llmtrain.data.files import BOM, read_rows, read_text, unpacked_lines
from llmtrain.data.jsonl import decode, parse_object
from llmtrain.data.rows import found_fields, text_field

# third-party code, tests, generated tables, and the text of the source `topics`
NOT_STDLIB = re.compile(r"site-packages|dist-packages|/tests?/|lib2to3|idlelib|turtledemo|encodings|pydoc_data")
MIN_STDLIB_BYTES = 500  # leaves out the stubs of packages


def documents(source: SourceConfig, seed: int) -> Iterator[str]:
    """Yields the source's documents, shuffled by `seed`, up to `max_bytes` of UTF-8; the last one is cut there.

    Raises ValueError when a file is missing or broken, or when there is no document at all.
    """
    rng = random.Random(f"{seed}:{source.name}")
    left, found = source.max_bytes, False
    for text in READERS[source.type](source, rng):
        if not text.strip():
            continue
        found = True
        if left is not None:
            text = text.encode()[:left].decode(errors="ignore")
            left -= len(text.encode())
        yield text
        if left is not None and left < 4:  # less than the longest character
            return
    if not found:
        raise ValueError(f"data source {source.name!r} ({source.type}) is empty: it has no document with text")


def stdlib(source: SourceConfig, rng: random.Random) -> Iterator[str]:
    """Returns the sources of Python's standard library, one document a file."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(p for p in root.rglob("*.py") if not NOT_STDLIB.search(f"/{p.relative_to(root).as_posix()}"))
    files = [p for p in files if p.stat().st_size > MIN_STDLIB_BYTES]
    rng.shuffle(files)
    return (path.read_bytes().decode() for path in files)


def topics(source: SourceConfig, rng: random.Random) -> Iterator[str]:
    """Returns the prose of the Python reference that `help()` shows."""
    from pydoc_data.topics import topics as chapters

    texts = [chapters[name] for name in sorted(chapters)]
    rng.shuffle(texts)
    return iter(texts)


def text_files(source: SourceConfig, rng: random.Random) -> Iterator[str]:
    """Yields the text of the source's files, one document a file. At the first that is no text all are looked at, and
    ValueError names each."""
    files = source_files(source)
    rng.shuffle(files)
    for path in files:
        try:
            yield read_text(str(path))
        except ValueError:
            raise_faults(source, files, lambda file, faults: noted(faults, str(file), lambda: read_text(str(file))))


def jsonl(source: SourceConfig, rng: random.Random) -> Iterator[str]:
    """Yields the field `text` (or `field`) of every line. Only the offsets of the lines are held in memory.

    At the first line that is broken all are looked at, and ValueError names each.
    """
    lines = [(path, start) for path in source_files(source) for start in line_starts(path)]
    rng.shuffle(lines)
    for path, start in lines:
        with open(path, "rb") as file:
            file.seek(start)
            line = file.readline()
        try:
            document = document_in(line, source.field)
        except ValueError:
            raise_faults(source, source_files(source), lambda file, faults: broken_lines(file, source.field, faults))
        yield document


def document_in(line: bytes, field: str) -> str:
    """Returns the document in a line of JSON. Raises ValueError, without a place, when there is none."""
    return text_of_row(parse_object(decode(line.removeprefix(BOM))), field)


def text_of_row(record: dict[str, Any], field: str) -> str:
    """Returns the field that holds a row's document. Raises ValueError, without a place, when it is no text."""
    if field not in record:
        raise ValueError(f"missing field {field!r}; found {found_fields(record)}; name yours with its key `field`")
    return text_field(record, field)


def rows(source: SourceConfig, rng: random.Random) -> Iterator[str]:
    """Yields the field `text` (or `field`) of every row of a file of any form; all rows are held in memory. Raises
    ValueError with all faults."""
    path = needed_path(source)
    faults = Faults(path)
    texts = []
    for where, record in read_rows(path, faults):
        try:
            texts.append(text_of_row(record, source.field))
        except ValueError as error:
            faults.add(where, str(error))
    faults.raise_any()
    rng.shuffle(texts)
    return iter(texts)


def broken_lines(path: Path, field: str, faults: Faults) -> None:
    """Adds every line of a file that holds no document to `faults`."""
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                noted(faults, f"{path}:{number}", lambda line=line: document_in(line, field))


def noted(faults: Faults, where: str, read: Callable[[], str]) -> None:
    """Adds the reason to `faults` if something cannot be read."""
    try:
        read()
    except ValueError as error:
        faults.add(where, str(error).removeprefix(f"{where}: "))


def raise_faults(source: SourceConfig, files: Iterable[Path], look: Callable[[Path, Faults], None]) -> NoReturn:
    """Looks at every file of a source, in which there is a fault. Raises ValueError with all that there are."""
    faults = Faults(f"data source {source.name!r}")
    for file in sorted(files):
        look(file, faults)
    faults.raise_any()
    raise AssertionError("the fault was seen before")


def arithmetic(source: SourceConfig, rng: random.Random) -> Iterator[str]:
    """Returns generated lines of sums and differences."""
    return arithmetic_documents(source.count, source.worked_share, rng)


def cleaned(source: SourceConfig, rng: random.Random) -> Iterator[str]:
    """Yields the texts that cleaning left. The seed decides the order of the files; within a file documents keep
    theirs, so that one is held in memory at a time: rows are shuffled when they are trained on. Raises ValueError
    at the first broken line or file."""
    directory = needed_path(source)
    files = sorted(Path(directory).rglob("*.jsonl.zst"))
    if not files:
        raise ValueError(f"data source {source.name!r}: {no_documents(Path(directory))}")
    rng.shuffle(files)
    for path in files:
        for number, line in enumerate(unpacked_lines(str(path)), 1):
            try:
                text = document_in(line, source.field)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from None
            yield text


READERS: dict[str, Callable[[SourceConfig, random.Random], Iterator[str]]] = {
    "stdlib": stdlib,
    "topics": topics,
    "text": text_files,
    "jsonl": jsonl,
    "rows": rows,
    "arithmetic": arithmetic,
    "cleaned": cleaned,
}


def no_documents(directory: Path) -> str:
    """Returns why there are no cleaned documents in a directory, and what to do."""
    report = directory.parent.parent / "report" / "index.html"
    if report.is_file():
        return f"cleaning left no document of it, {report} says why; remove the source, or change data.clean"
    return (
        f"no *.jsonl.zst below {directory}; clean documents with `llmtrain data` and data.collect first, or give the "
        "path of cleaned ones"
    )


def needed_path(source: SourceConfig) -> str:
    """Returns the path of a source that reads files. Raises ValueError when none is given."""
    if source.path is None:
        raise ValueError(f"data source {source.name!r} of type {source.type} needs a path: a file, directory or glob")
    return source.path


def source_files(source: SourceConfig) -> list[Path]:
    """Returns the files that `path` means, sorted: itself, all below a directory, or the matches of a glob."""
    path = needed_path(source)
    found = matches(os.path.join(glob.escape(path), "**") if os.path.isdir(path) else path)
    files = sorted(Path(p) for p in found if os.path.isfile(p))
    if not files:
        raise ValueError(f"data source {source.name!r}: no file at {path}; give a file, directory or glob")
    if closed := [str(file) for file in files if not os.access(file, os.R_OK)]:
        raise ValueError(f"data source {source.name!r}: {closed[0]} cannot be read; change its permissions or leave it")
    return files


def line_starts(path: Path) -> Iterator[int]:
    """Yields the offset in bytes of every line that is not blank."""
    start = 0
    with open(path, "rb") as file:
        for text in file:
            if text.strip():
                yield start
            start += len(text)
