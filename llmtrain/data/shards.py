"""Writes and reads flat files of token ids, one per source and split, read by memory map.

`<source>-<split>.bin` holds the ids (uint16, or uint32 for a vocabulary above 65,536), every document with what the
tokenizer puts before a text (BOS, if it does) and the end-of-text id behind it; `<source>-<split>.offsets.npy` the
start of every document and the end of the last (int64); `shards.json` the counts, the fingerprint of the tokenizer, and
a checksum of each file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from llmtrain.config.schema import SourceConfig
from llmtrain.data.collect import documents
from llmtrain.data.pieces import Grown, SourceFiles, encoder, write_pieces
from llmtrain.data.tokenizer import Tokenizer

SPLITS = ("train", "held_out")
MANIFEST = "shards.json"
ENDS = (".bin", ".offsets.npy")  # of the files of a source and split
ONLY_TRAINING = ("weight", "max_epochs", "language")  # keys of a source that shards do not depend on


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
    workers: int = 1,
    contents: str = "",
) -> None:
    """Tokenizes every source, in `workers` processes. `progress` is called now and then with a source and the number of
    its bytes done. What an earlier call left that was killed is kept, if `contents` says the same of what the sources
    hold.

    Raises ValueError for a source without text, or without a document left to train on.
    """
    os.makedirs(directory, exist_ok=True)
    dtype, counts, sha256 = token_dtype(tokenizer.vocab_size), {}, {}
    with encoder(tokenizer, dtype, workers) as encode_all:
        for source in sources:
            settings = source.model_dump(mode="json", exclude=set(ONLY_TRAINING))
            made_from = json.dumps([settings, seed, tokenizer.fingerprint, contents], sort_keys=True)
            key = hashlib.sha256(made_from.encode()).hexdigest()
            files = SourceFiles(directory, source.name, SPLITS, np.dtype(dtype).itemsize, key)
            write_pieces(files, split_documents(source, seed), encode_all, partial(progress, source.name))
            counts[source.name] = {split: counted(grown) for split, grown in files.grown.items()}
            sha256 |= write_offsets(files, source.name, directory)
    manifest = {
        "tokenizer": tokenizer.fingerprint,
        "eos_id": tokenizer.eos_id,
        "dtype": dtype,
        "sources": counts,
        "sha256": sha256,
    }
    Path(directory, MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def counted(grown: Grown) -> dict[str, int]:
    """Returns what shards.json says of a split."""
    return {"documents": grown.documents, "tokens": grown.tokens, "bytes": grown.bytes}


def write_offsets(files: SourceFiles, name: str, directory: str) -> dict[str, str]:
    """Writes where the documents of a source begin; returns the checksums of all its files by their names."""
    sha256 = {}
    for split, grown in files.grown.items():
        offsets = os.path.join(directory, f"{name}-{split}{ENDS[1]}")
        np.save(offsets, np.concatenate([[0], np.cumsum(files.lengths(split))]).astype(np.int64), allow_pickle=False)
        sha256[f"{name}-{split}{ENDS[0]}"] = grown.sha256.hexdigest()
        sha256[os.path.basename(offsets)] = sha256_of(offsets)
    return sha256


def sha256_of(path: str) -> str:
    """Returns the checksum of a whole file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify_shards(directory: str) -> None:
    """Reads all shards. Raises ValueError with a line for each file that is not what shards.json says."""
    known = read_manifest(directory).get("sha256")
    if known is None:
        raise ValueError(
            f"{directory}: an earlier version wrote shards.json, without checksums to verify; make the shards anew, or "
            "set data.verify=false"
        )
    paths = {name: os.path.join(directory, name) for name in known}
    wrong = [name for name, path in paths.items() if not os.path.isfile(path) or sha256_of(path) != known[name]]
    if wrong:
        remedy = f"is not what {MANIFEST} says of it, or missing; delete .bin, .npy and .json files and make them anew"
        raise ValueError("\n".join(f"{paths[name]}: {remedy}" for name in wrong))


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
            "delete its .bin, .npy and .json files (clean/ may stay) and make them anew"
        )
    # an empty file cannot be mapped
    tokens = np.memmap(path + ".bin", dtype, mode="r") if size else np.empty(0, dtype)
    offsets = np.load(path + ".offsets.npy", mmap_mode="r", allow_pickle=False)
    return ShardReader(tokens, offsets, counts["bytes"], manifest["eos_id"])
