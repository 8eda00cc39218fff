"""Builds a store: documents are read, cut, ranked by words, and embedded where there is an encoder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llmtrain.config.index import IndexConfig
from llmtrain.data.faults import Faults
from llmtrain.data.search.bm25 import write_bm25
from llmtrain.data.search.documents import Document, Ids, documents_in, files_of
from llmtrain.data.search.passages import spans
from llmtrain.data.search.store import (
    EMBEDDINGS,
    FORMAT,
    MANIFEST,
    OFFSETS,
    PASSAGES,
    Passage,
    model_digest,
    read_manifest,
    refuse_changed,
)
from llmtrain.observe.contents import Checksums
from llmtrain.observe.log import progress

UNWRITTEN = {"path", "documents", "batch_passages", "rebuild"}  # keys that no byte of a store depends on by themselves
Files = list[tuple[str, int]]
"""Holds the files to read, each with the number of its entry in index.documents."""


@dataclass
class Counts:
    """Counts what a store was made of."""

    documents: int = 0
    passages: int = 0
    empty: list[str] = field(default_factory=list)  # where documents without text stand


def listed_files(index: IndexConfig) -> Files:
    """Returns all files to read. Raises ValueError with every entry at which there is nothing, and every file that two
    entries name."""
    faults, files, first = Faults("index.documents"), [], dict[str, str]()
    for number, asked in enumerate(index.documents):
        at = f"index.documents.{asked.name or number}.path"
        try:
            found = files_of(asked)
        except ValueError as error:
            faults.add(at, str(error))
            continue
        for path in found:
            if (other := first.setdefault(os.path.realpath(path), at)) != at:
                faults.add(at, f"{path} is named by {other} too, and would be found twice; leave it out of one")
        files += [(path, number) for path in found]
    faults.raise_any()
    return files


def identity(index: IndexConfig, files: Files) -> dict[str, Any]:
    """Returns what a store depends on: settings, files and their checksums, the encoder's and tokenizer's."""
    checksums = Checksums()
    settings = index.model_dump(exclude=UNWRITTEN)
    fields = [asked.model_dump(include={"field", "id_field"}) for asked in index.documents]
    sources = [{"path": path, "sha256": checksums.of(path), **fields[number]} for path, number in files]
    found: dict[str, Any] = {"store_format": FORMAT, "settings": settings, "sources": sources}
    if index.model is not None:
        found["settings"]["model"] = os.path.abspath(index.model)
        found["model_digest"] = model_digest(index.model)
    if index.unit == "tokens":
        found["tokenizer_digest"] = checksums.of(tokenizer_file(index))
    return found


def is_made(directory: str, wanted: dict[str, Any], rebuild: bool) -> bool:
    """Says whether a directory holds the store that is wanted, whole. Raises ValueError when it holds another one, and
    it is not to be replaced (`rebuild`)."""
    try:
        manifest = read_manifest(Path(directory))
        refuse_changed(Path(directory))
    except ValueError:
        return False  # nothing there, a file of it is missing, or it is of another version
    differs = [key for key in wanted if manifest.get(key) != wanted[key]]
    if not differs or rebuild:
        return not differs
    raise ValueError(
        f"{directory}: holds a store that was made with other {' and '.join(map(_named, differs))}; set "
        "index.rebuild=true to replace it, or give another index.path"
    )


def _named(key: str) -> str:
    return {"sources": "documents", "model_digest": "files of index.model"}.get(key, key.replace("_", " "))


def build(index: IndexConfig, files: Files, wanted: dict[str, Any], directory: Path, device: str) -> dict[str, Any]:
    """Writes a store into a new directory; returns its manifest. Raises ValueError with all faults of all documents,
    and when they hold no text."""
    counts = write_passages(index, files, directory)
    written = {"documents": counts.documents, "passages": counts.passages, "empty_documents": len(counts.empty)}
    if index.model is not None:
        written |= write_embeddings(index, directory, counts.passages, device)
    with open(directory / PASSAGES, encoding="utf-8") as lines, progress(counts.passages, 0, "words") as update:
        texts = told((json.loads(line)["text"] for line in lines), counts.passages, update)
        written["words"] = write_bm25(directory, texts, index.k1, index.b)
    manifest = wanted | written
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return manifest


def told(texts: Iterator[str], count: int, update: Callable[[int, dict[str, float]], None]) -> Iterator[str]:
    """Yields the texts, and tells a progress bar of each hundredth and the last."""
    for number, text in enumerate(texts, 1):
        yield text
        if number % 100 == 0 or number == count:
            update(number, {})


def write_passages(index: IndexConfig, files: Files, directory: Path) -> Counts:
    """Writes the passages of all documents, and where each line begins."""
    faults, ids, counts, offsets = Faults("index.documents"), Ids(), Counts(), [0]
    cut = cutter(index)
    with open(directory / PASSAGES, "wb") as out, progress(len(files), 0, "documents") as update:
        for number, (path, entry) in enumerate(files, 1):
            for document in documents_in(path, index.documents[entry], faults):
                if not ids.is_new(document, faults) or faults.count:
                    continue
                for line in lines_of(document, cut, counts):
                    offsets.append(offsets[-1] + out.write(line))
            update(number, {"passages": counts.passages})
    faults.raise_any()
    if not counts.passages:
        raise ValueError(f"index.documents: {len(files)} files, and no text in them; give others")
    np.save(directory / OFFSETS, np.array(offsets, np.int64), allow_pickle=False)
    return counts


def lines_of(document: Document, cut: Callable[[str], Iterator[tuple[int, int]]], counts: Counts) -> Iterator[bytes]:
    """Yields the lines of a document's passages, counted."""
    before = counts.passages
    for start, end in cut(document.text):
        passage = Passage(counts.passages, *document[:3], start, end, document.text[start:end])
        record = {key: value for key, value in asdict(passage).items() if key != "number"}
        counts.passages += 1
        yield json.dumps(record, ensure_ascii=False).encode() + b"\n"
    counts.documents += 1
    if counts.passages == before:
        counts.empty.append(document.where)


def cutter(index: IndexConfig) -> Callable[[str], Iterator[tuple[int, int]]]:
    """Returns what cuts a text as the settings say."""
    size, overlap = index.passage_size, index.passage_overlap
    if index.unit == "characters":
        return lambda text: spans(text, size, overlap)
    import tokenizers

    path = tokenizer_file(index)
    try:
        tokenizer = tokenizers.Tokenizer.from_file(path)
    except Exception as error:  # the library has one class for all
        raise ValueError(f"{path}: is no tokenizer ({' '.join(str(error).split())[:200]}); give another") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda text: spans(text, size, overlap, tokenizer.encode(text, add_special_tokens=False).offsets)


def tokenizer_file(index: IndexConfig) -> str:
    """Returns the tokenizer.json whose tokens are counted."""
    return os.path.join(index.tokenizer or index.model or "", "tokenizer.json")


def write_embeddings(index: IndexConfig, directory: Path, count: int, device: str) -> dict[str, int]:
    """Writes the embeddings of all passages; returns what the manifest says of them."""
    import torch

    from llmtrain.data.search.encoder import Encoder

    assert index.model is not None
    encoder = Encoder(index.model, torch.device(device))
    texts = [index.passage_prefix + text for text in passage_texts(directory)]
    with progress(count, 0, "embeddings") as update:
        rows, cut = encoder.embed(texts, index.batch_passages, lambda done: update(done, {}))
    np.save(directory / EMBEDDINGS, rows, allow_pickle=False)
    return {"cut_by_encoder": cut, "encoder_max_tokens": encoder.max_tokens}


def passage_texts(directory: Path) -> Sequence[str]:
    """Returns the texts of all passages."""
    with open(directory / PASSAGES, encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]
