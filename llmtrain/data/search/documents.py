"""Reads the documents that a store is made of: text files, one document each, and files of rows, one a row."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import NamedTuple

from llmtrain.config.clean import CollectConfig
from llmtrain.config.index import DocumentsConfig
from llmtrain.config.rows import COMPRESSIONS, FORMATS
from llmtrain.data.clean.read.fields import known, value_of
from llmtrain.data.clean.read.listing import MAGIC, Listed, below, globbed, is_regular
from llmtrain.data.clean.read.text import shown
from llmtrain.data.collect import text_of_row
from llmtrain.data.faults import Faults
from llmtrain.data.files import file_rows, read_bytes, text_of
from llmtrain.data.jsonl import Record

TEXTS = (".txt", ".text", ".md", ".markdown", ".rst")  # endings of text files that are read below a directory
LISTING = CollectConfig(name="index", type="text")  # how what is below a directory is looked at


class Document(NamedTuple):
    """Holds a document as it stands in its file.

    Example: the second line of a file of rows: Document("faq-7", "faq.jsonl:2", "https://a.example/faq", "How ...")
    """

    id: str  # as its row says, else `where`
    where: str  # the file, of a row file:line
    url: str | None  # what the row says of its place in the web
    text: str


def files_of(asked: DocumentsConfig) -> list[str]:
    """Returns the files that an entry means, sorted. Below a directory those of a known form are read, links are not
    followed, and hidden files left out. Raises ValueError when there is none, or one is no regular file."""
    files = sorted(each.path for each in _listed(asked.path) if each.reason is None)
    if not files:
        raise ValueError(f"{asked.path}: no file to index there; give a file, a directory or a glob")
    if odd := [path for path in files if not is_regular(path)]:
        what = "is no regular file" if os.path.lexists(odd[0]) else "is not there"
        raise ValueError(f"{shown(odd[0])}: {what}; give a file, a directory or a glob")
    return files


def _listed(path: str) -> list[Listed]:
    if os.path.isdir(path):
        return list(below(path, LISTING, lambda file: bare(file).endswith((*TEXTS, *FORMATS))))
    named = os.path.lexists(path) or not MAGIC.search(path)
    return [Listed(path)] if named else list(globbed(path, LISTING))


def bare(path: str) -> str:
    """Returns a path in lower case, without the ending of a compression. Example: "A.JSONL.zst" -> "a.jsonl"."""
    return next((path.removesuffix(each) for each in COMPRESSIONS if path.endswith(each)), path).lower()


def documents_in(path: str, asked: DocumentsConfig, faults: Faults) -> Iterator[Document]:
    """Yields the documents of one file; what cannot be used goes to `faults`, with its file and line."""
    try:
        if bare(path).endswith(FORMATS):
            yield from (d for record in file_rows(path, faults) if (d := _in_row(record, asked, faults)) is not None)
            return
        text = text_of(read_bytes(path), path)
    except ValueError as error:  # `file: reason` or `file:line: reason`
        where = re.match(re.escape(path) + r"(:\d+)?(?=: )", str(error))
        place = path if where is None else where[0]
        return faults.add(place, str(error).removeprefix(f"{place}: "))
    if (document := checked(Document(shown(path), shown(path), None, text), faults)) is not None:
        yield document


def _in_row(record: Record, asked: DocumentsConfig, faults: Faults) -> Document | None:
    where, row = record
    try:
        id_ = shown(where) if asked.id_field is None else id_of(row, asked.id_field)
        document = Document(id_, shown(where), known(row).get("url"), text_of_row(row, asked.field))
    except ValueError as error:
        return faults.add(where, str(error))
    return checked(document, faults)


def id_of(row: dict[str, object], field: str) -> str:
    """Returns the id in a row. Raises ValueError, without a place, when it is none: a text or a number, not long."""
    found = value_of(row.get(field))
    if found is None or not found.isprintable():
        raise ValueError(f"field {field!r} must name the document by a text or a number, found {row.get(field)!r:.60}")
    return found


def checked(document: Document, faults: Faults) -> Document | None:
    """Returns a document that is text, None for a fault: a NUL character stands in no text."""
    if "\0" not in document.text:
        return document
    return faults.add(document.where, "holds a NUL character, so it is no text; convert it or leave it out")


class Ids:
    """Knows the ids that were given so far, so that none is given twice."""

    def __init__(self) -> None:
        self.first: dict[str, str] = {}

    def is_new(self, document: Document, faults: Faults) -> bool:
        """Says whether no document before has this id; another one is a fault."""
        first = self.first.setdefault(document.id, document.where)
        if first != document.where:
            faults.add(document.where, f"id {document.id!r:.80} is that of {first} too; give each document its own")
        return first == document.where
