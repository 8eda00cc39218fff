"""Writes files durably with a checksum, and writes and reads safetensors files tensor by tensor."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import TypedDict

import numpy as np
from torch import Tensor


class FileEntry(TypedDict):
    """Holds what the manifest records of a file."""

    bytes: int
    sha256: str


def write_durably(path: str, chunks: Iterable[bytes | np.ndarray]) -> FileEntry:
    """Writes a file, flushes it to the disk, and returns its size and checksum, computed while writing.

    Raises OSError naming the file (a failed write or fsync does not name it by itself).
    """
    digest, size = hashlib.sha256(), 0
    try:
        with open(path, "wb") as f:
            for chunk in chunks:
                f.write(chunk)
                digest.update(chunk)
                size += memoryview(chunk).nbytes
            f.flush()
            os.fsync(f.fileno())
    except OSError as e:
        raise OSError(e.errno, e.strerror, path) from e
    return {"bytes": size, "sha256": digest.hexdigest()}


def write_json(path: str, value: object) -> FileEntry:
    """Writes a value as JSON, see `write_durably`."""
    return write_durably(path, [json.dumps(value, indent=1).encode()])


def safetensors_chunks(tensors: Mapping[str, Tensor]) -> Iterator[bytes | np.ndarray]:
    """Yields a safetensors file of flat fp32 tensors, with one tensor at a time in host memory (the library needs all).

    Format: header length (8 bytes, little endian), JSON header padded with spaces, values back to back.
    """
    entries, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        entries[name] = {"dtype": "F32", "shape": [tensor.numel()], "data_offsets": [start, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    yield struct.pack("<Q", len(header)) + header
    for tensor in tensors.values():
        yield as_array(tensor.cpu().contiguous())


def as_array(tensor: Tensor) -> np.ndarray:
    """Returns the tensor's memory as an array. (`Tensor.numpy` forbids the storage to be resized for good, and so the
    tensor to be moved to the host.)"""
    return np.from_dlpack(tensor.detach())


class FlatFile:
    """Reads parts of a file that `safetensors_chunks` wrote.

    (The library maps the file, and every page that was read counts as this process's memory until the file is closed.)
    """

    def __init__(self, path: str) -> None:
        self.path = path
        with open(path, "rb") as f:
            (length,) = struct.unpack("<Q", f.read(8))
            entries = json.loads(f.read(length))
        self.starts = {name: 8 + length + entry["data_offsets"][0] for name, entry in entries.items()}

    def read(self, name: str, begin: int, out: Tensor) -> None:
        """Fills `out`, flat and contiguous fp32, with the elements of the tensor `name` from `begin` on.

        Raises ValueError where the file ends too early.
        """
        with open(self.path, "rb") as f:
            f.seek(self.starts[name] + 4 * begin)
            if f.readinto(out.numpy()) != out.nbytes:
                raise ValueError(f"{self.path}: ends within {name}; verify it before it is read")
