"""Reads a store that `llmtrain index` wrote, and finds passages in it.

| file | what it holds |
|---|---|
| manifest.json | settings, the documents' files with their checksums, counts |
| passages.jsonl | a passage a line; offsets.npy: where each line begins, and the end |
| bm25.safetensors, vocabulary.json | the scores of all words in all passages |
| embeddings.npy | a row of length 1 for each passage, where there is an encoder |
| .llmtrain.json | size and checksum of each of these |
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmtrain.config.index import StoreMode
from llmtrain.data.search.bm25 import SCORES, VOCABULARY, Bm25, read_bm25
from llmtrain.observe.contents import Checksums, files_at
from llmtrain.observe.owned import MARKER, read_marker, unchanged

FORMAT = 1  # raised when the files of a store change
MANIFEST, PASSAGES, OFFSETS, EMBEDDINGS = "manifest.json", "passages.jsonl", "offsets.npy", "embeddings.npy"
AGAIN = "remove or move {}, then run `llmtrain index` again"  # which replaces nothing that was changed
RRF_K = 60  # of reciprocal rank fusion, as in the paper
RRF_DEPTH = 100  # ranks of each list that fusion looks at, at least
Embed = Callable[[str], NDArray[np.float32]]
"""Embeds a question, with the prefix of questions, as a row of length 1."""


@dataclass(frozen=True)
class Passage:
    """Holds a passage of a document.

    Example: Passage(12, "guide.md", "guide.md", None, 0, 640, "# Guide\\n...") is the first of guide.md
    """

    number: int  # in the store, from 0
    document: str  # its id
    where: str  # file, or file:line of its row
    url: str | None
    start: int  # place in the document, in characters
    end: int
    text: str

    @property
    def source(self) -> str:
        """Returns where a person finds it. Example: "https://a.example/faq (faq.jsonl:2), characters 0 to 640"."""
        named = self.url or (self.document if self.document != self.where else None)
        place = self.where if named is None else f"{named} ({self.where})"
        return f"{place}, characters {self.start} to {self.end}"


@dataclass(frozen=True)
class Hit:
    """Holds a passage that was found, and its score: BM25, cosine, or the sum of reciprocal ranks."""

    passage: Passage
    score: float


@dataclass
class Store:
    """Finds passages. `embed` is needed for embeddings alone.

    Example: Store(directory, manifest, "bm25").search("how do I export?", 3) -> up to 3 hits, the best first
    """

    directory: Path
    manifest: dict[str, Any]
    mode: StoreMode
    embed: Embed | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.offsets = np.load(self.directory / OFFSETS, allow_pickle=False)
        self.lines = np.memmap(self.directory / PASSAGES, np.uint8, "r")

    def __len__(self) -> int:
        return self.manifest["passages"]

    @cached_property
    def bm25(self) -> Bm25:
        return read_bm25(self.directory, len(self))

    @cached_property
    def embeddings(self) -> NDArray[np.float32]:
        return np.load(self.directory / EMBEDDINGS, mmap_mode="r", allow_pickle=False)

    def search(self, question: str, k: int) -> list[Hit]:
        """Returns the `k` best passages for a question, the best first; of equal ones the first in the store.

        `bm25` finds only passages that hold a word of the question, and so may find fewer. `hybrid` sums
        1 / (60 + rank) over both lists (reciprocal rank fusion, Cormack et al., SIGIR 2009).
        """
        if self.mode == "hybrid":
            depth = max(RRF_DEPTH, k)
            found = fused([self._ranked(question, each, depth) for each in ("bm25", "embedding")])[:k]
        else:
            found = self._ranked(question, self.mode, k)
        return [Hit(self.passage(number), score) for number, score in found]

    def passage(self, number: int) -> Passage:
        """Returns a passage by its number."""
        start, end = self.offsets[number : number + 2]
        return Passage(number, **json.loads(self.lines[start:end].tobytes()))

    def _ranked(self, question: str, mode: StoreMode, k: int) -> list[tuple[int, float]]:
        if mode == "bm25":
            scores = self.bm25.scores(question)
            return top(scores, np.flatnonzero(scores > 0), k)
        assert self.embed is not None, "open_store gives it"
        scores = self.embeddings @ self.embed(question)
        return top(scores, np.arange(len(scores)), k)


def top(scores: NDArray[np.float32], among: NDArray[np.intp], k: int) -> list[tuple[int, float]]:
    """Returns (number, score) of the `k` highest scores among some, the highest first; of equal ones the lower
    number."""
    if len(among) > k:
        least = np.partition(scores[among], -k)[-k]
        among = among[scores[among] >= least]
    order = among[np.argsort(-scores[among], kind="stable")][:k]
    return [(int(i), float(scores[i])) for i in order]


def fused(lists: list[list[tuple[int, float]]]) -> list[tuple[int, float]]:
    """Returns (number, sum of 1 / (60 + rank)) of all that lists rank, the highest first, ranks counted from 1; of
    equal ones the lower number."""
    sums: dict[int, float] = {}
    for ranked in lists:
        for rank, (number, _) in enumerate(ranked, 1):
            sums[number] = sums.get(number, 0.0) + 1 / (RRF_K + rank)
    return sorted(sums.items(), key=lambda each: (-each[1], each[0]))


def open_store(directory: str, mode: StoreMode | None = None, device: str = "cpu") -> Store:
    """Returns the store in a directory; `mode` None: hybrid where it has embeddings, else bm25.

    Raises ValueError when bm25s is not installed, there is no store, one of its files is not as it was written, it is
    of another version, or `mode` asks for embeddings that it has not, or whose encoder is gone or another by now.
    """
    place = Path(directory)
    manifest = read_manifest(place)
    if find_spec("bm25s") is None:
        raise ValueError(f"{directory}: needs bm25s; pip install 'llmtrain[search]' -c constraints.txt")
    embeds = manifest["settings"]["model"] is not None
    mode = mode or ("hybrid" if embeds else "bm25")
    if mode != "bm25" and not embeds:
        raise ValueError(f"{directory}: was made without index.model, so it has no embeddings; search it by bm25")
    refuse_changed(place)
    if mode == "bm25":
        return Store(place, manifest, mode)
    return Store(place, manifest, mode, query_embedder(manifest, device))


def read_manifest(directory: Path) -> dict[str, Any]:
    """Returns the manifest of a store. Raises ValueError when there is none that this version reads."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        version = manifest["store_format"]
    except (OSError, ValueError, LookupError, TypeError):
        raise ValueError(f"{directory}: is no store; make one with `llmtrain index`, or give its directory") from None
    if version != FORMAT:
        raise ValueError(f"{directory}: is a store of format {version!r:.20}, this version reads {FORMAT}; index again")
    return manifest


def refuse_changed(directory: Path) -> None:
    """Raises ValueError when a file of a store is missing, or not as it was written."""
    files = read_marker(directory).get("files", {})
    wanted = {MANIFEST, PASSAGES, OFFSETS, SCORES, VOCABULARY}
    if not wanted <= files.keys():
        raise ValueError(f"{directory}: its {MARKER} does not list the files of a store; {AGAIN.format(directory)}")
    if changed := [name for name, listed in files.items() if not unchanged(directory / name, listed)]:
        raise ValueError(f"{directory}: {', '.join(sorted(changed))}: not as it was written; {AGAIN.format(directory)}")


def model_digest(path: str) -> str:
    """Returns a checksum over the files of an encoder's directory."""
    return Checksums().of_all(
        [file for file in files_at(path) if file.endswith((".json", ".txt", ".safetensors", ".model"))]
    )


def query_embedder(manifest: dict[str, Any], device: str) -> Embed:
    """Returns what embeds questions as the passages of a store were. Raises ValueError when its encoder is gone, or
    another by now."""
    import torch

    from llmtrain.data.search.encoder import Encoder

    settings = manifest["settings"]
    path, prefix = settings["model"], settings["query_prefix"]
    if not os.path.isdir(path):
        raise ValueError(f"{path}: the encoder of the store is gone; bring it back, or search by bm25")
    if model_digest(path) != manifest["model_digest"]:
        raise ValueError(f"{path}: the encoder is another than that of the store; index again, or search by bm25")
    encoder = Encoder(path, torch.device(device))
    return lambda question: encoder.embed([prefix + question], 1)[0][0]
