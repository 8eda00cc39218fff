"""Reads raw documents of any form: the first step of a pipeline, of which each task reads some of the files.

What is no document is skipped and counted, by a reason: a row, a page, or what is left of a file that cannot be read
further. Readers are in `llmtrain.data.clean.read`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from importlib.util import find_spec
from typing import Any

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.writers.disk_base import DiskWriter

from llmtrain.config.clean import CollectConfig
from llmtrain.config.clean.collect import is_html, kind_of
from llmtrain.data.clean.read.apart import Apart
from llmtrain.data.clean.read.code import code_file
from llmtrain.data.clean.read.files import html_file, pdf_file, text_file
from llmtrain.data.clean.read.hub import dataset_file
from llmtrain.data.clean.read.items import BrokenError, Found, Item, Skipped, UnusableError
from llmtrain.data.clean.read.listing import is_regular, listing
from llmtrain.data.clean.read.pydoc import pydoc_pages
from llmtrain.data.clean.read.rows import row_file
from llmtrain.data.clean.read.stream import local_path
from llmtrain.data.clean.read.text import GUESSED, mended, shown
from llmtrain.data.clean.read.warc import warc_file, wet_file
from llmtrain.data.clean.step import utf8_bytes

READERS: dict[str, Callable[[str, CollectConfig, Apart], Iterator[Item]]] = {
    "text": text_file,
    "markdown": text_file,
    "jsonl": row_file,
    "parquet": row_file,
    "csv": row_file,
    "warc": warc_file,
    "wet": wet_file,
    "html": html_file,
    "pdf": pdf_file,
    "code": code_file,
    "dialogue": row_file,
    "datasets": dataset_file,
    "pydoc": pydoc_pages,
}


def input_files(config: CollectConfig) -> list[str]:
    """Returns the paths of an input's files, sorted; a data set that is loaded by its name is one."""
    return [path for path, reason in listing(config) if reason is None]


def task_count(config: CollectConfig) -> int:
    """Returns how many tasks can have a file each."""
    return len(input_files(config))


def refuse_unreadable(config: CollectConfig) -> None:
    """Raises ValueError, in one line, when an input has no file that can be read, or lacks a package that reads it."""
    key = f"data.collect.{config.name}.path={config.path}"
    if config.type == "pydoc":
        return
    if config.path is None:
        raise ValueError(f"{key}: type {config.type} reads files; give a file, a directory or a glob")
    if config.type == "pdf" and find_spec("pypdf") is None:
        raise ValueError(f"data.collect.{config.name}.type=pdf: it needs pypdf; `pip install 'llmtrain[data]'`")
    try:
        listed = listing(config)
    except Exception as error:  # the libraries of file systems have errors of their own
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{key}: it cannot be listed ({reason}); give a path that fsspec can read here") from None
    files = [each.path for each in listed if each.reason is None]
    if not files:
        reasons = sorted({each.reason for each in listed if each.reason})
        found = f"{len(listed)} entries, all of them {', '.join(reasons)}" if listed else "nothing"
        raise ValueError(f"{key}: no file of type {config.type}, found {found}; give a file, a directory or a glob")
    if config.type == "datasets" and files == [config.path]:
        return  # whether datasets can load it is seen when it does
    for path in (local for file in files if (local := local_path(file)) is not None):
        if not is_regular(path):
            what = "is no regular file" if os.path.lexists(path) else "is not there"
            raise ValueError(f"{key}: {shown(path)} {what}; give a file, a directory or a glob")
        if not os.access(path, os.R_OK):
            raise ValueError(f"{key}: {shown(path)} may not be read; change its rights or leave it out")


class Collect(PipelineStep):
    """Yields the documents of an input. Up to `examples` skipped places a task go to `dropped`, as documents without
    text whose metadata say `dropped_by` and `reason`.

    Counts: `files`, `documents_out`, `bytes_out`, `dropped/REASON`, and `mended/NOTE` for documents that were changed
    to be valid text. A file without anything in it is dropped as `empty_file`.
    """

    type, name = "clean", "collect"

    def __init__(self, config: CollectConfig, dropped: DiskWriter | None = None, examples: int = 0) -> None:
        super().__init__()
        self.config, self.dropped, self.examples = config, dropped, examples

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Yields the documents of this task's files, one at a time."""
        left, found = self.examples, 0
        limits = self.config.timeout_s, self.config.max_memory_bytes
        with closing(Apart(*limits)) as apart, self.dropped or nullcontext():
            for path, item in self.items(rank, world_size, apart):
                if isinstance(item, Found):
                    yield self.document(path, item)
                    found += 1
                    if found == self.config.max_documents:
                        return
                elif self.dropped is not None and left > 0:
                    left -= 1
                    self.dropped.write(self.example(path, item), rank)

    def items(self, rank: int, world_size: int, apart: Apart) -> Iterator[tuple[str, Item]]:
        """Yields (file, what is found or skipped in it), counted. The first task counts what is no file to read."""
        listed = listing(self.config)
        for path, reason in listed if rank == 0 else ():
            if reason is not None:
                yield path, self.skipped(None, reason)
        for path in [path for path, reason in listed if reason is None][rank::world_size]:
            self.stat_update("files")
            with closing(self.file_items(path, apart)) as items:
                while (item := self.timed(items)) is not None:
                    yield path, item

    def timed(self, items: Iterator[Item]) -> Item | None:
        """Returns the next item, its time counted."""
        with self.track_time():
            return next(items, None)

    def file_items(self, path: str, apart: Apart) -> Iterator[Item]:
        """Yields what is in a file, valid and counted; what is left of one that is broken is one reason."""
        empty = True
        try:
            with closing(READERS[self.config.type](path, self.config, apart)) as items:
                for item in items:
                    empty = False
                    yield self.skipped(*item) if isinstance(item, Skipped) else self.checked(item)
        except (UnusableError, BrokenError) as error:
            yield self.skipped(None, str(error))
        except FileNotFoundError:
            yield self.skipped(None, "vanished")
        except OSError:
            yield self.skipped(None, "unreadable")
        else:
            if empty:
                yield self.skipped(None, "empty_file")

    def checked(self, item: Found) -> Item:
        """Returns what was found as valid text, or skipped where it has none; counts what is yielded."""
        text, notes = mended(item.text)
        if GUESSED in item.notes and not self.config.guess_charset:
            return self.skipped(item.number, "binary")
        if not text.strip():
            return self.skipped(item.number, "empty")
        self.stat_update("documents_out")
        self.stat_update("bytes_out", value=utf8_bytes(text))
        for note in (*item.notes, *notes):
            self.stat_update(f"mended/{note}")
        return item._replace(text=text)

    def skipped(self, number: int | None, reason: str) -> Skipped:
        """Counts a reason."""
        self.stat_update(f"dropped/{reason}")
        return Skipped(number, reason)

    def document(self, path: str, item: Found) -> Document:
        """Returns the document of what was found."""
        said = {key: mended(value)[0] if isinstance(value, str) else value for key, value in item.fields.items()}
        said |= {"encoding": "cp1252"} if GUESSED in item.notes else {}
        said = {key: value.isoformat() if hasattr(value, "isoformat") else value for key, value in said.items()}
        id_ = said.pop("id", None) or f"{shown(path)}#{item.number}"
        return Document(item.text, id_, metadata=self.metadata(path) | {k: v for k, v in said.items() if v is not None})

    def example(self, path: str, item: Skipped) -> Document:
        """Returns a document that says what was skipped."""
        said = {"dropped_by": self.name, "reason": item.reason, "row": item.number}
        return Document("", f"{shown(path)}#{item.number or 0}", metadata=self.metadata(path) | said)

    def metadata(self, path: str) -> dict[str, Any]:
        """Returns what the configuration says of every document of a file."""
        known = {"source": self.config.name, "kind": kind_of(self.config), "file": shown(path)}
        known |= {"html": False} if known["kind"] == "web" and not is_html(self.config) else {}
        return known | {key: getattr(self.config, key) for key in ("date", "licence", "language")}
