"""Writes the files of documents that one phase leaves for the next: JSON lines, compressed by zstd."""

from __future__ import annotations

from datatrove.data import Document
from datatrove.pipeline.writers.jsonl import JsonlWriter


class RankWriter(JsonlWriter):
    """Writes documents into `folder`/RANK.jsonl.zst. Nothing in a document's metadata can change the name, as it can in
    datatrove's writer."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder, "${rank}.jsonl.zst", compression="zstd")

    def _get_output_filename(self, document: Document, rank: int | str = 0, **kwargs: object) -> str:
        return self.output_filename.substitute(rank=str(rank).zfill(5))
