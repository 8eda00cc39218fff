"""Extracts the text of PDF documents with pypdf. It runs in the process of `llmtrain.data.clean.read.apart`."""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from llmtrain.data.clean.read.items import Found, Item, UnusableError

if TYPE_CHECKING:
    from pypdf import PdfReader


def pdf_items(data: bytes, max_pages: int, max_bytes: int) -> Iterator[Item]:
    """Yields the document, its pages apart by an empty line. Pages that cannot be read are left out and noted; raises
    UnusableError where none can."""
    reader = opened(data)
    pages, broken, held_bytes = [], 0, 0
    for page in islice(reader.pages, max_pages):
        try:
            pages.append(page.extract_text())
        except Exception:  # whatever pypdf raises at a page that is broken; time and memory are watched outside
            broken += 1
            continue
        held_bytes += len(pages[-1])
        if held_bytes > max_bytes:
            raise UnusableError("too_large")
    if broken and not pages:
        raise UnusableError("pdf_broken")
    notes = [*["pdf_pages_broken"] * bool(broken), *["pdf_pages_left_out"] * (len(reader.pages) > max_pages)]
    yield Found(1, "\n\n".join(pages), {"date": created(reader), "pages": len(pages)}, tuple(notes))


def opened(data: bytes) -> PdfReader:
    """Returns the reader of a PDF. Raises UnusableError when it needs a password."""
    from pypdf import PdfReader

    reader = PdfReader(io.BytesIO(data), strict=False)
    if reader.is_encrypted and not reader.decrypt(""):
        raise UnusableError("pdf_encrypted")
    return reader


def created(reader: PdfReader) -> Any:
    """Returns when the document was made, None where that cannot be read."""
    try:
        return reader.metadata.creation_date if reader.metadata else None
    except Exception:  # metadata may hold anything
        return None
