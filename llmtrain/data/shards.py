"""Writes and reads flat files of token ids, one per source and split, read by memory map.

`<source>-<split>.bin` holds the ids (uint16, or uint32 for a vocabulary above 65,536), every document with what the
tokenizer puts before a text (BOS, if it does) and the end-of-text id behind it; `<source>-<split>.offsets.npy` the
start of every document and the end of the last (int64); `shards.json` the counts, and the fingerprint of the tokenizer.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from llmtrain.config.schema import SourceConfig
from llmtrain.data.collect import documents
from llmtrain.data.tokenizer import Tokenizer

SPLITS = ("train", "held_out")
MANIFEST = "shards.json"
ENDS = (".bin", ".offsets.npy")  # of the files of a source and split
BATCH = 64  # documents tokenized together


@dataclass(frozen=True)
class ShardReader:
    """Holds the tokens of one source and split."""

    tokens: np.ndarray  # [tokens], mapped
    offsets: np.ndarray  # [documents + 1] int64, in tokens
    text_bytes: int  # UTF-8 bytes of the text
    eos_id: int


def split_documents(source: SourceConfig, seed: int) -> Iterator[tuple[str, str]]:
    """Yields (split, text) of every document. The share `held_out`, spread evenly, is for validation; the first never
    is. Of a source that is one document its last part is."""
    stream = documents(source, seed)
    first = list(islice(stream, 2))
    if len(first) == 1 and source.held_out:
        yield from zip(SPLITS, cut(first[0], 1 - source.held_out), strict=True)
        return
    for i, text in enumerate(chain(first, stream)):
        held = i > 0 and math.ceil(i * source.held_out) > math.ceil((i - 1) * source.held_out)
        yield SPLITS[held], text


def cut(text: str, share: float) -> tuple[str, str]:
    """Returns the first `share` of a text and the rest, cut behind a line if there is one, else behind a word."""
    at = int(len(text) * share)
    ends = (text.rfind(end, 0, at) + 1 for end in ("\n", " "))
    at = next((end for end in ends if end), at)
    return text[:at], text[at:]


def write_shards(
    sources: Sequence[SourceConfig],
    tokenizer: Tokenizer,
    directory: str,
    seed: int,
    progress: Callable[[str, int], None] = lambda source, text_bytes: None,
) -> None:
    """Tokenizes every source. `progress` is called now and then with a source and the number of its bytes done.

    Raises ValueError for a source without text, or without a document left to train on.
    """
    os.makedirs(directory, exist_ok=True)
    counts = {source.name: write_source(source, tokenizer, directory, seed, progress) for source in sources}
    manifest = {
        "tokenizer": tokenizer.fingerprint,
        "eos_id": tokenizer.eos_id,
        "dtype": token_dtype(tokenizer.vocab_size),
        "sources": counts,
    }
    Path(directory, MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def write_source(
    source: SourceConfig, tokenizer: Tokenizer, directory: str, seed: int, progress: Callable[[str, int], None]
) -> dict[str, dict[str, int]]:
    """Writes the files of one source; returns documents, tokens and bytes by split."""
    dtype, stream = token_dtype(tokenizer.vocab_size), split_documents(source, seed)
    before = tokenizer.prefix_ids
    lengths: dict[str, list[int]] = {split: [] for split in SPLITS}
    text_bytes = dict.fromkeys(SPLITS, 0)
    paths = {split: os.path.join(directory, f"{source.name}-{split}") for split in SPLITS}
    with open(paths["train"] + ".bin", "wb") as train, open(paths["held_out"] + ".bin", "wb") as held_out:
        files = {"train": train, "held_out": held_out}
        while batch := list(islice(stream, BATCH)):
            all_ids = tokenizer.encode_batch([text for _, text in batch], parse_special=False)
            for (split, text), ids in zip(batch, all_ids, strict=True):
                ids = [*before, *ids, tokenizer.eos_id]
                files[split].write(np.array(ids, dtype))
                lengths[split].append(len(ids))
                text_bytes[split] += len(text.encode())
            progress(source.name, sum(text_bytes.values()))
    for split, path in paths.items():
        np.save(path + ".offsets.npy", np.cumsum([0, *lengths[split]], dtype=np.int64), allow_pickle=False)
    return {s: {"documents": len(lengths[s]), "tokens": sum(lengths[s]), "bytes": text_bytes[s]} for s in SPLITS}


def token_dtype(vocab_size: int) -> str:
    return "uint16" if vocab_size <= 2**16 else "uint32"


def read_manifest(directory: str) -> dict[str, Any]:
    """Returns the content of shards.json. Raises ValueError when the directory has none."""
    path = Path(directory, MANIFEST)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; data.path has no token shards yet, write them with `llmtrain data`")
    return json.loads(path.read_text())


def shard_files(directory: str) -> list[str]:
    """Returns the paths of shards.json and of all files that it describes, sorted."""
    names = [f"{name}-{split}{end}" for name in read_manifest(directory)["sources"] for split in SPLITS for end in ENDS]
    return sorted(os.path.join(directory, name) for name in (MANIFEST, *names))


def check_tokenizer(directory: str, tokenizer: Tokenizer) -> None:
    """Raises ValueError when the shards were made with another tokenizer."""
    written = read_manifest(directory)["tokenizer"]
    if written != tokenizer.fingerprint:
        raise ValueError(
            f"{directory}: the shards were made with tokenizer {written}, but {tokenizer.directory} is "
            f"{tokenizer.fingerprint}; set tokenizer.path to the first, or delete the shards and make them anew"
        )


def holds_out(directory: str) -> bool:
    """Returns whether any source has tokens that are held out."""
    return any(counts["held_out"]["tokens"] for counts in read_manifest(directory)["sources"].values())


def open_shards(directory: str, split: str) -> dict[str, ShardReader]:
    """Returns readers by source, for `train` or `held_out`. Raises ValueError when a file is missing or cut short."""
    manifest = read_manifest(directory)
    return {
        name: open_source(os.path.join(directory, f"{name}-{split}"), counts[split], manifest)
        for name, counts in manifest["sources"].items()
    }


def open_source(path: str, counts: dict[str, int], manifest: dict[str, Any]) -> ShardReader:
    dtype = np.dtype(manifest["dtype"])
    size = os.path.getsize(path + ".bin") if os.path.isfile(path + ".bin") else -1
    if size != counts["tokens"] * dtype.itemsize or not os.path.isfile(path + ".offsets.npy"):
        raise ValueError(
            f"{path}.bin: {size} bytes where {MANIFEST} says {counts['tokens'] * dtype.itemsize} (-1 = missing); "
            "delete the directory and make the shards anew"
        )
    # an empty file cannot be mapped
    tokens = np.memmap(path + ".bin", dtype, mode="r") if size else np.empty(0, dtype)
    offsets = np.load(path + ".offsets.npy", mmap_mode="r", allow_pickle=False)
    return ShardReader(tokens, offsets, counts["bytes"], manifest["eos_id"])
