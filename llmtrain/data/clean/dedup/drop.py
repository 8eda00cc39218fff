"""Drops the copies, and takes out paragraphs, that were found over all inputs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

from datatrove.data import Document, DocumentsPipeline
from datatrove.io import DataFolder
from datatrove.pipeline.writers.disk_base import DiskWriter

from llmtrain.config.clean.dedup import ParagraphConfig
from llmtrain.data.clean.dedup.forest import LINK
from llmtrain.data.clean.dedup.keys import read_id
from llmtrain.data.clean.dedup.paragraphs import MARK, without
from llmtrain.data.clean.dedup.parts import Part
from llmtrain.data.clean.dedup.tables import ByPart
from llmtrain.data.clean.step import Check, Step


class DropCopies(Step):
    """Drops the documents of a part that an earlier one stands for, as `exact` or `near`, and those from which too
    little is left, as `paragraphs`. Examples of dropped copies name what stays as `copy_of` in their metadata."""

    name = "dedup"

    def __init__(
        self,
        root: str,
        parts: Sequence[Part],
        forest: str | None,
        marks: Sequence[str],
        paragraphs: ParagraphConfig | None,
        dropped: DiskWriter | None,
        examples: int,
    ) -> None:
        super().__init__(self.name, self.check, None, dropped, examples)
        self.folder, self.parts = DataFolder(f"{root}/dedup"), parts
        self.forest, self.marks, self.paragraphs = forest, marks, paragraphs

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Yields the documents that stay."""
        self.settings = self.parts[rank]
        return super().run(data, rank, world_size)

    def check(self, part: Part) -> Check:
        """Returns the check of a part's documents, which must come in their order."""
        links = ByPart(self.folder, [self.forest] if self.forest else [], LINK, part)
        marks = ByPart(self.folder, self.marks, MARK, part)
        rows, named = count(), count()

        def copied(document: Document) -> str | None:
            row = next(rows)
            for link in links.of(row):
                if next(named) < self.examples:
                    document.metadata["copy_of"] = read_id(self.folder, int(link["root"]))
                return "exact" if link["exact"] else "near"
            return self.shortened(document, {int(mark["high"]) for mark in marks.of(row)})

        return copied

    def shortened(self, document: Document, highs: set[int]) -> str | None:
        """Takes paragraphs out of a document and says whether too little is left."""
        if not highs or self.paragraphs is None:
            return None
        self.stat_update("paragraphs_removed", value=len(highs))
        document.text = without(document.text, self.paragraphs, highs)
        return "paragraphs" if len(document.text.split()) < self.paragraphs.min_words else None
