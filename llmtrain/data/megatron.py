"""Gives shards the form of Megatron's indexed data sets, which its own loader and others read.

`<source>-<split>_text_document.bin` has the bytes of our `.bin`, and is a second name of that file where a file can
have two. `.idx` says where documents begin: `MMIDIDX\\0\\0`, version 1 (uint64), a code of the type of a token (uint8),
the numbers of sequences and of entries of the last list (uint64 each), the tokens of each sequence (int32), its first
byte (int64), and the first sequence of each document with the number of sequences behind it (int64). A document is one
sequence. Source: `megatron/core/datasets/indexed_dataset.py` of Megatron-LM.
"""

from __future__ import annotations

import os
import struct

import numpy as np

from llmtrain.data.shards import SPLITS, open_shards, read_manifest
from llmtrain.observe.files import linked
from llmtrain.observe.owned import filling

MAGIC, FORMAT_VERSION = b"MMIDIDX\0\0", 1
TYPE_CODES = {"uint16": 8, "uint32": 4}  # 4 is int32: no token id is so large that the bytes differ
ENDS = ("_text_document.bin", "_text_document.idx")


def export_megatron(directory: str) -> None:
    """Writes the files of all sources and splits with text beside the shards, unless they are there."""
    dtype = read_manifest(directory)["dtype"]
    stems = {
        f"{name}-{split}": reader.offsets
        for split in SPLITS
        for name, reader in open_shards(directory, split).items()
        if len(reader.tokens)
    }
    stems = {
        stem: offsets
        for stem, offsets in stems.items()
        if not all(os.path.exists(os.path.join(directory, stem + end)) for end in ENDS)
    }
    if not stems:
        return
    with filling(directory, "llmtrain data", [stem + end for stem in stems for end in ENDS]) as staging:
        for stem, offsets in stems.items():
            linked(os.path.join(directory, f"{stem}.bin"), staging / (stem + ENDS[0]))
            (staging / (stem + ENDS[1])).write_bytes(index(offsets, dtype))


def index(offsets: np.ndarray, dtype: str) -> bytes:
    """Returns the content of an `.idx` file for documents between these offsets, in tokens."""
    lengths, starts = np.diff(offsets), offsets[:-1] * np.dtype(dtype).itemsize
    documents = np.arange(len(offsets))
    head = MAGIC + struct.pack("<QBQQ", FORMAT_VERSION, TYPE_CODES[dtype], len(lengths), len(documents))
    return head + lengths.astype("<i4").tobytes() + starts.astype("<i8").tobytes() + documents.astype("<i8").tobytes()
