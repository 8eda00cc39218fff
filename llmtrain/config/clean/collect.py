"""Defines the keys of an entry of `data.collect`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from llmtrain.config.section import DeadlineS, Section, UserPath

RowType = Literal["jsonl", "parquet", "csv", "dialogue", "datasets"]
FileType = Literal["text", "markdown", "warc", "wet", "html", "pdf", "code"]
CollectType = Literal[RowType, FileType, "pydoc"]
"""The forms of files that are read; pydoc reads none and makes pages from Python's standard library."""
Kind = Literal["web", "prose", "code", "dialogue"]
"""Decides which cleaning steps a document goes through."""
BY_TYPE: dict[str, Kind] = {
    **{"warc": "web", "wet": "web", "html": "web", "pydoc": "web"},
    **{"code": "code", "dialogue": "dialogue"},
}
"""The kind of documents of each type; those of others are prose."""


class CollectConfig(Section):
    """Describes one input of raw documents."""

    name: str  # names the input in the report, its output, and the source in `data.sources`
    type: CollectType  # form of the files; pydoc: none, pages are made from Python's standard library
    path: UserPath | None = None  # file, directory, glob, URL that fsspec reads (s3://...); datasets: or a hub name
    kind: Kind | None = None  # None = by type: warc, html, wet: web; code: code; dialogue: dialogue; others: prose
    html: bool | None = None  # the text is HTML, of which web extracts the main part; None = of warc, html, pydoc
    field: str = "text"  # jsonl, parquet, csv, datasets: the field that holds the text
    id_field: str | None = None  # the field that holds an id; None = file and number of the row
    licence: str | None = None  # of all documents, unless a row or repository names its own
    language: str | None = None  # known language code of all documents; None = it is identified
    date: str | None = None  # of all documents, unless they name their own
    priority: int = 0  # of copies the one of the highest priority stays, then the first in the document's order
    max_documents: PositiveInt | None = None  # read at most so many from each task's files
    split: str = "train"  # datasets: the split
    configuration: str | None = None  # datasets: the configuration
    streamed: bool = False  # datasets: read from the hub as a stream, without a download
    guess_charset: bool = True  # text in a charset that is not detected is taken for Windows-1252; false: is skipped
    max_bytes: PositiveInt = Field(50_000_000)  # a document, page or row larger than this is skipped and counted
    max_ratio: PositiveInt = 200  # bytes that a compressed file may hold for each of its own, beyond max_bytes
    max_pages: PositiveInt = 2000  # pdf: pages that are read, the rest of the document is left out and counted
    timeout_s: DeadlineS = 30.0  # pdf: for one document; parquet: for one row
    max_memory_bytes: PositiveInt = Field(4_000_000_000)  # pdf, parquet: memory of the process that reads them
    max_copy_bytes: PositiveInt = Field(20_000_000_000)  # parquet, compressed or not local: disk for its temporary copy


HTML = ("warc", "html", "pydoc")
"""Types whose documents are HTML."""


def is_html(config: CollectConfig) -> bool:
    """Returns whether an input's documents are HTML."""
    return config.type in HTML if config.html is None else config.html


def kind_of(config: CollectConfig) -> Kind:
    """Returns the kind of an input's documents: its own, or that of its type."""
    return config.kind or BY_TYPE.get(config.type, "prose")
