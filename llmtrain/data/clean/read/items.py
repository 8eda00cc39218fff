"""Says what a reader of documents yields: what it found, or what it skipped and why."""

from __future__ import annotations

from typing import Any, NamedTuple


class Found(NamedTuple):
    """Holds a document as it stands in its file."""

    number: int  # of the line, row, record or page in its file, from 1
    text: str
    fields: dict[str, Any]  # what the place says of it: id, date, licence, language, url, and what is a reader's own
    notes: tuple[str, ...] = ()  # what was mended or left out, each a counter


class Skipped(NamedTuple):
    """Says that something in a file is no document."""

    number: int | None  # None = the file as a whole
    reason: str  # in snake_case, of few distinct values: it is a counter


Item = Found | Skipped


class UnusableError(Exception):
    """Says that one document cannot be used; its argument is the reason."""


class BrokenError(Exception):
    """Says that a file cannot be read, or not further; its argument is the reason, counted once."""
