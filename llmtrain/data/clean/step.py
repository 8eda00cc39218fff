"""Runs a plain function on every document of a datatrove pipeline, counting what came in, what went on, and why not.

A cleaning step is a *check*: a function of a document that may change its text and metadata and returns why the
document is dropped, or None to keep it. A *maker* builds the check from a section of the configuration; it is called in
the worker, so that word lists, models and processes live there. A check may have the attribute `counts`, a mapping of
names to numbers that it counted itself; they join the step's own at the end of the task.

Example: `Step("short", lambda settings: lambda document: "empty" if not document.text else None, settings, dropped)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.writers.disk_base import DiskWriter

Check = Callable[[Document], str | None]
Maker = Callable[[Any], Check]

EXCERPT_CHARS = 4000
# Metadata that every document has: where it comes from and what is known of it. Others are a step's own.
KEYS = ("source", "kind", "file", "date", "licence", "language")


class Step(PipelineStep):
    """Applies the check that `make(settings)` returns. Dropped documents, up to `examples` a task and cut after
    EXCERPT_CHARS, go to `dropped` with `dropped_by` and `reason` in their metadata."""

    type = "clean"

    def __init__(
        self, name: str, make: Maker, settings: Any, dropped: DiskWriter | None = None, examples: int = 0
    ) -> None:
        self.name, self.make, self.settings, self.dropped, self.examples = name, make, settings, dropped, examples
        super().__init__()  # after the name, which the counts of the step are saved under

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Yields the documents that the check keeps."""
        check, left = self.make(self.settings), self.examples
        with self.ending(check), self.dropped or nullcontext():
            for document in data:
                reason = self.counted(check, document)
                if reason is None:
                    yield document
                elif self.dropped is not None and left > 0:
                    left -= 1
                    self.dropped.write(excerpt(document, self.name, reason), rank)

    @contextmanager
    def ending(self, check: Check) -> Iterator[None]:
        """Adds what the check counted itself at the end, and closes it."""
        with closing_check(check):
            try:
                yield
            finally:
                for name, value in getattr(check, "counts", {}).items():
                    self.stat_update(name, value=value)

    def counted(self, check: Check, document: Document) -> str | None:
        """Returns the check's reason, and counts documents, UTF-8 bytes and seconds."""
        self.stat_update("documents_in")
        self.stat_update("bytes_in", value=utf8_bytes(document.text))
        with self.track_time():
            reason = check(document)
        if reason is None:
            self.stat_update("documents_out")
            self.stat_update("bytes_out", value=utf8_bytes(document.text))
        else:
            self.stat_update(f"dropped/{reason}")
        return reason


@contextmanager
def closing_check(check: Check) -> Iterator[None]:
    """Closes the check at the end, where it holds a process or a file."""
    try:
        yield
    finally:
        getattr(check, "close", lambda: None)()


def excerpt(document: Document, step: str, reason: str) -> Document:
    """Returns what is kept of a dropped document to be looked at."""
    metadata = document.metadata | {"dropped_by": step, "reason": reason}
    return Document(document.text[:EXCERPT_CHARS], document.id, metadata=metadata)


def utf8_bytes(text: str) -> int:
    """Returns the bytes of a text in UTF-8; half a surrogate pair counts as it is."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
