"""Reads and writes the files of documents that deduplication works on, in the order in which copies are kept.

A part is the file of one rank of one input. Parts stand in the order of priority, then of the inputs, then of ranks;
a document's *place*, 64 bits, is its part's number and its row, so that of copies the one with the lowest place stays.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from datatrove.data import Document, DocumentsPipeline
from datatrove.io import DataFolder
from datatrove.pipeline.base import PipelineStep

from llmtrain.config.clean.collect import CollectConfig

ROW_BITS = 32  # of a place; the others are the part's number


class Part(NamedTuple):
    """Names the file of documents that a rank of an input wrote."""

    index: int
    name: str
    rank: int

    @property
    def path(self) -> str:
        return f"{self.name}/{self.rank:05d}.jsonl.zst"


def ordered_parts(inputs: Sequence[CollectConfig], tasks: Mapping[str, int]) -> list[Part]:
    """Returns all parts, those first whose documents stay. `tasks` has the number of ranks of each input."""
    ordered = sorted(inputs, key=lambda source: -source.priority)
    names = [(source.name, rank) for source in ordered for rank in range(tasks[source.name])]
    return [Part(index, name, rank) for index, (name, rank) in enumerate(names)]


def read_part(folder: DataFolder, part: Part) -> Iterator[Document]:
    """Yields the documents of a part in their order; none where there is no file. Raises what a broken file raises."""
    import orjson

    if not folder.isfile(part.path):
        return
    with folder.open(part.path, "rb", compression="zstd") as file, io.BufferedReader(file) as lines:
        for line in lines:
            row = orjson.loads(line)
            yield Document(row.get("text", ""), row.get("id", ""), metadata=row.get("metadata", {}))


class ReadPart(PipelineStep):
    """Yields the documents of the part that a task's rank means, empty ones too: rows must not shift."""

    type, name = "dedup", "read"

    def __init__(self, root: str, parts: Sequence[Part]) -> None:
        super().__init__()
        self.folder, self.parts = DataFolder(f"{root}/cleaned"), parts

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Yields the documents."""
        yield from read_part(self.folder, self.parts[rank])
