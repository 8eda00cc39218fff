"""Reads the documents of one source, in an order that depends only on the seed."""

from __future__ import annotations

import glob
import os
import random
import re
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

from llmtrain.config.schema import SourceConfig
from llmtrain.data.arithmetic import arithmetic_documents
from llmtrain.data.jsonl import parse_line, text_field

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
    return map(read_text, files)


def topics(source: SourceConfig, rng: random.Random) -> Iterator[str]:
    """Returns the prose of the Python reference that `help()` shows."""
    from pydoc_data.topics import topics as chapters

    texts = [chapters[name] for name in sorted(chapters)]
    rng.shuffle(texts)
    return iter(texts)


def text_files(source: SourceConfig, rng: random.Random) -> Iterator[str]:
    """Returns the text of the source's files, one document a file."""
    files = source_files(source)
    rng.shuffle(files)
    return map(read_text, files)


def jsonl(source: SourceConfig, rng: random.Random) -> Iterator[str]:
    """Yields the field `text` of every line. Only the offsets of the lines are held in memory."""
    lines = [(path, number, start) for path in source_files(source) for number, start in line_starts(path)]
    rng.shuffle(lines)
    for path, number, start in lines:
        with open(path, "rb") as file:
            file.seek(start)
            record = parse_line(decode(file.readline(), f"{path}:{number}"), path, number)
        yield text_field(record, ("text",), f"{path}:{number}")


def arithmetic(source: SourceConfig, rng: random.Random) -> Iterator[str]:
    """Returns generated lines of sums and differences."""
    return arithmetic_documents(source.count, source.worked_share, rng)


READERS: dict[str, Callable[[SourceConfig, random.Random], Iterator[str]]] = {
    "stdlib": stdlib,
    "topics": topics,
    "text": text_files,
    "jsonl": jsonl,
    "arithmetic": arithmetic,
}


def source_files(source: SourceConfig) -> list[Path]:
    """Returns the files that `path` means, sorted: itself, all below a directory, or the matches of a glob."""
    if source.path is None:
        raise ValueError(f"data source {source.name!r} of type {source.type} needs a path: a file, directory or glob")
    pattern = os.path.join(source.path, "**") if os.path.isdir(source.path) else source.path
    files = sorted(Path(p) for p in glob.glob(pattern, recursive=True) if os.path.isfile(p))
    if not files:
        raise ValueError(f"data source {source.name!r}: no file at {source.path}")
    return files


def read_text(path: Path) -> str:
    return decode(path.read_bytes(), str(path))


def decode(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 text (byte {error.start}); convert it or leave it out") from None


def line_starts(path: Path) -> Iterator[tuple[int, int]]:
    """Yields (line number from 1, offset in bytes) of every line that is not blank."""
    start = 0
    with open(path, "rb") as file:
        for number, text in enumerate(file, 1):
            if text.strip():
                yield number, start
            start += len(text)
