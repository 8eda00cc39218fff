"""Writes the keys that equal and near equal documents share, and the forests of those that share one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from datatrove.data import DocumentsPipeline
from datatrove.io import DataFolder
from datatrove.pipeline.base import PipelineStep

from llmtrain.config.clean.dedup import DedupConfig
from llmtrain.data.clean.dedup.forest import LINK, joined, links
from llmtrain.data.clean.dedup.hashing import Bands, digest, normalized
from llmtrain.data.clean.dedup.parts import ROW_BITS, Part
from llmtrain.data.clean.dedup.tables import (
    RANGES,
    KeyWriter,
    copies,
    load_ranges,
    read_keys,
    read_records,
    save_by_part,
    save_ranges,
)


class WriteKeys(PipelineStep):
    """Writes the keys of a part's documents: of the whole text if equal texts are looked for, then of every band."""

    type, name = "dedup", "keys"

    def __init__(self, root: str, settings: DedupConfig) -> None:
        super().__init__()
        self.folder, self.settings = DataFolder(f"{root}/dedup"), settings

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> None:
        """Writes `keys/RANK` and `ids/RANK`, by which later tasks name a document of this part."""
        near = Bands(self.settings.minhash) if self.settings.minhash else None
        equal = int(self.settings.exact)
        with (
            KeyWriter(self.folder, f"keys/{rank:05d}", tables(self.settings)) as keys,
            IdWriter(self.folder, f"ids/{rank:05d}") as ids,
        ):
            for row, document in enumerate(data):
                self.stat_update("documents")
                with self.track_time():
                    ids.add(document.id)
                    if equal:
                        keys.add(0, digest(normalized(document.text)), row)
                    for band, key in enumerate(near.keys(document.text) if near else ()):
                        keys.add(equal + band, key, row)


def tables(settings: DedupConfig) -> int:
    """Returns how many keys a document has."""
    return int(settings.exact) + (settings.minhash.buckets if settings.minhash else 0)


class IdWriter:
    """Writes the ids of a part's documents, so that one can be read without the document."""

    def __init__(self, folder: DataFolder, name: str) -> None:
        self.folder, self.name, self.lengths = folder, name, [0]

    def __enter__(self) -> IdWriter:
        self.file = self.folder.open(f"{self.name}.bin", "wb")
        return self

    def add(self, name: str) -> None:
        """Writes the id of the next document."""
        self.lengths.append(self.file.write(name.encode("utf-8", "surrogatepass")))

    def __exit__(self, *_: object) -> None:
        self.file.close()
        save_ranges(self.folder, self.name, np.cumsum(self.lengths))


def read_id(folder: DataFolder, place: int) -> str:
    """Returns the id of the document at a place."""
    name, row = f"ids/{place >> ROW_BITS:05d}", place & ((1 << ROW_BITS) - 1)
    start, stop = load_ranges(folder, name)[row : row + 2]
    return read_records(folder, name, np.dtype("u1"), start, stop).tobytes().decode("utf-8", "surrogatepass")


class FindCopies(PipelineStep):
    """Finds documents that share a key. Each task looks at its own ranges of keys, in all tables and all parts."""

    type, name = "dedup", "copies"

    def __init__(self, root: str, settings: DedupConfig, parts: Sequence[Part]) -> None:
        super().__init__()
        self.folder, self.settings, self.parts = DataFolder(f"{root}/dedup"), settings, parts

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> None:
        """Writes the task's forest, `forests/0/RANK`."""
        names = [f"keys/{part.index:05d}" for part in self.parts]
        own = RANGES * rank // world_size, RANGES * (rank + 1) // world_size
        forest = np.empty(0, LINK)
        for table in range(tables(self.settings)):
            for keys in read_keys(self.folder, names, table, *own):
                places, roots, _ = copies(keys)
                exact = self.settings.exact and table == 0
                forest = joined(np.concatenate([forest, links(places, roots, exact)]))
        save_by_part(self.folder, f"forests/0/{rank:05d}", forest, len(self.parts))
        self.stat_update("links", value=len(forest))


class MergeForests(PipelineStep):
    """Joins the forests of up to `fan_in` tasks of the level below to one."""

    type, name = "dedup", "merge"

    def __init__(self, root: str, level: int, below: int, fan_in: int, parts: int) -> None:
        super().__init__()
        self.folder, self.level, self.parts = DataFolder(f"{root}/dedup"), level, parts
        self.below, self.fan_in = below, fan_in

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> None:
        """Writes the task's forest, `forests/LEVEL/RANK`."""
        forest = np.empty(0, LINK)
        for other in range(rank * self.fan_in, min((rank + 1) * self.fan_in, self.below)):
            name = f"forests/{self.level - 1}/{other:05d}"
            links_below = read_records(self.folder, name, LINK, 0, load_ranges(self.folder, name)[-1])
            forest = joined(np.concatenate([forest, links_below]))
        save_by_part(self.folder, f"forests/{self.level}/{rank:05d}", forest, self.parts)
        self.stat_update("links", value=len(forest))
