"""Finds paragraphs that an earlier document has too, and takes them out."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Sequence

import numpy as np
from datatrove.data import DocumentsPipeline
from datatrove.io import DataFolder
from datatrove.pipeline.base import PipelineStep

from llmtrain.config.clean.dedup import ParagraphConfig
from llmtrain.data.clean.dedup.forest import LINK
from llmtrain.data.clean.dedup.hashing import digest, normalized
from llmtrain.data.clean.dedup.parts import Part
from llmtrain.data.clean.dedup.tables import RANGES, ByPart, KeyWriter, copies, read_keys, save_by_part

MARK = np.dtype([("place", "<u8"), ("high", "<u8")])  # a document, and half of the key of a paragraph that it loses
SEPARATORS = {"line": re.compile(r"(\n)"), "blank_line": re.compile(r"(\n[^\S\n]*\n\s*)")}


def paragraphs(text: str, settings: ParagraphConfig) -> Iterator[tuple[str, bytes | None]]:
    """Yields every paragraph with what separates it from the next, and its key; None for one that is too short."""
    pieces = [*SEPARATORS[settings.split].split(text), ""]
    for paragraph, separator in zip(pieces[::2], pieces[1::2], strict=True):
        folded = normalized(paragraph)
        yield paragraph + separator, digest(folded) if len(folded) >= settings.min_chars else None


def without(text: str, settings: ParagraphConfig, highs: Container[int]) -> str:
    """Returns a text without the paragraphs whose keys have these high halves."""
    pieces = paragraphs(text, settings)
    return "".join(piece for piece, key in pieces if key is None or high(key) not in highs).rstrip()


def high(key: bytes) -> int:
    """Returns the high half of a key as tables have it."""
    return int.from_bytes(key[:8], "little")


class WriteParagraphs(PipelineStep):
    """Writes the keys of the paragraphs of a part's documents, of those that are no copies as a whole."""

    type, name = "dedup", "paragraph keys"

    def __init__(self, root: str, settings: ParagraphConfig, parts: Sequence[Part], forest: str | None) -> None:
        super().__init__()
        self.folder, self.settings = DataFolder(f"{root}/dedup"), settings
        self.parts, self.forest = parts, forest

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> None:
        """Writes `paragraphs/RANK`; a paragraph that a document has twice once."""
        dropped = ByPart(self.folder, [self.forest] if self.forest else [], LINK, self.parts[rank])
        with KeyWriter(self.folder, f"paragraphs/{rank:05d}", 1) as keys:
            for row, document in enumerate(data):
                self.stat_update("documents")
                with self.track_time():
                    found = () if len(dropped.of(row)) else paragraphs(document.text, self.settings)
                    for key in sorted({key for _, key in found if key is not None}):
                        keys.add(0, key, row)


class MarkParagraphs(PipelineStep):
    """Marks paragraphs for removal. Each task looks at its own ranges of keys in all parts."""

    type, name = "dedup", "paragraph marks"

    def __init__(self, root: str, parts: Sequence[Part]) -> None:
        super().__init__()
        self.folder, self.parts = DataFolder(f"{root}/dedup"), parts

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> None:
        """Writes the task's marks, `marks/RANK`."""
        names = [f"paragraphs/{part.index:05d}" for part in self.parts]
        own = RANGES * rank // world_size, RANGES * (rank + 1) // world_size
        marks = [np.empty(0, MARK)]
        for keys in read_keys(self.folder, names, 0, *own):
            places, _, highs = copies(keys)
            marks.append(np.empty(len(places), MARK))
            marks[-1]["place"], marks[-1]["high"] = places, highs
        found = np.concatenate(marks)
        found = found[np.lexsort((found["high"], found["place"]))]
        save_by_part(self.folder, f"marks/{rank:05d}", found, len(self.parts))
        self.stat_update("marks", value=len(found))
