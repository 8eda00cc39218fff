"""Keeps sorted records in files of which a reader takes a range: `NAME.bin` holds the records, `NAME.npy` where each
range begins and ends."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from datatrove.io import DataFolder

from llmtrain.data.clean.dedup.parts import ROW_BITS, Part

RANGES = 256  # ranges of keys that can be read alone: the first byte of a key
PLACED = np.dtype([("high", "<u8"), ("low", "<u8"), ("place", "<u8")])  # the same of documents of all parts
KEY = np.dtype([("high", "<u8"), ("low", "<u8"), ("row", "<u4")])  # a hash of 128 bits, and who has it
RUN_RECORDS = 1 << 18  # records of a table that are held while keys are made: 5 MB, and as much again to sort them
SLICE_RECORDS = 1 << 21  # records of a table that are compared at a time: about 200 MB while they are sorted


class KeyWriter:
    """Writes the keys of a part's documents, in runs that fit into memory; in each run the tables stand one after the
    other, each sorted by key. Ranges are of shape (runs, tables, RANGES + 1), in records."""

    def __init__(self, folder: DataFolder, name: str, tables: int) -> None:
        self.folder, self.name = folder, name
        self.keys = [bytearray() for _ in range(tables)]
        self.rows = [array("I") for _ in range(tables)]
        self.ranges: list[np.ndarray] = []
        self.written = 0

    def __enter__(self) -> KeyWriter:
        self.file = self.folder.open(f"{self.name}.bin", "wb")
        return self

    def add(self, table: int, key: bytes, row: int) -> None:
        """Notes that a row has a key of 16 bytes in a table."""
        self.keys[table] += key
        self.rows[table].append(row)
        if len(self.rows[table]) == RUN_RECORDS:
            self.flush()

    def flush(self) -> None:
        """Writes what was noted as a run, and forgets it."""
        self.ranges.append(np.stack([self.write_table(*noted) for noted in zip(self.keys, self.rows, strict=True)]))
        for noted in (*self.keys, *self.rows):
            del noted[:]

    def write_table(self, keys: bytearray, rows: array[int]) -> np.ndarray:
        """Writes a table and returns where its ranges begin and end."""
        table = np.empty(len(rows), KEY)
        table["high"], table["low"] = np.frombuffer(bytes(keys), "<u8").reshape(-1, 2).T
        table["row"] = rows
        table = table[np.lexsort((table["row"], table["low"], table["high"]))]
        self.file.write(table.tobytes())
        self.written += len(table)
        firsts = np.searchsorted(table["high"] >> np.uint64(56), np.arange(RANGES + 1, dtype=np.uint64))
        return firsts + self.written - len(table)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.flush()
            save_ranges(self.folder, self.name, np.stack(self.ranges))
        self.file.close()


def save_ranges(folder: DataFolder, name: str, ranges: np.ndarray) -> None:
    """Writes where the ranges of a table begin and end."""
    with folder.open(f"{name}.npy", "wb") as file:
        np.save(file, ranges)


def load_ranges(folder: DataFolder, name: str) -> np.ndarray:
    """Returns where the ranges of a table begin and end."""
    with folder.open(f"{name}.npy", "rb") as file:
        return np.load(file)


def save_by_part(folder: DataFolder, name: str, records: np.ndarray, parts: int) -> None:
    """Writes records that are sorted by place, of which `ByPart` reads those of one part."""
    with folder.open(f"{name}.bin", "wb") as file:
        file.write(records.tobytes())
    ends = np.searchsorted(records["place"] >> np.uint64(ROW_BITS), np.arange(parts + 1, dtype=np.uint64))
    save_ranges(folder, name, ends)


class ByPart:
    """Holds the records of a part's documents, from the tables of several tasks."""

    def __init__(self, folder: DataFolder, names: Sequence[str], dtype: np.dtype, part: Part) -> None:
        pieces = [np.empty(0, dtype)]
        for name in names:
            start, stop = load_ranges(folder, name)[part.index : part.index + 2]
            pieces.append(read_records(folder, name, dtype, start, stop))
        records = np.concatenate(pieces)
        self.records = records[np.argsort(records["place"], kind="stable")]
        self.rows = (self.records["place"] & np.uint64((1 << ROW_BITS) - 1)).astype(np.int64)

    def of(self, row: int) -> np.ndarray:
        """Returns the records of a document."""
        start, stop = np.searchsorted(self.rows, (row, row + 1))
        return self.records[start:stop]


def read_records(folder: DataFolder, name: str, dtype: np.dtype, start: int, stop: int) -> np.ndarray:
    """Returns the records from `start` to before `stop`."""
    if start == stop:
        return np.empty(0, dtype)
    with folder.open(f"{name}.bin", "rb") as file:
        file.seek(int(start) * dtype.itemsize)
        return np.frombuffer(file.read(int(stop - start) * dtype.itemsize), dtype)


def read_keys(folder: DataFolder, names: Sequence[str], table: int, first: int, end: int) -> Iterator[np.ndarray]:
    """Yields the keys of all parts in the ranges from `first` to before `end`, in slices that fit into memory, as
    arrays of (high, low, place), sorted. Equal keys are always in one slice."""
    ranges = [load_ranges(folder, name)[:, table, first : end + 1] for name in names]
    counts = sum(np.diff(of_part, axis=1).sum(axis=0) for of_part in ranges)
    bounds = [0, *np.flatnonzero(np.diff(np.cumsum(counts) // SLICE_RECORDS)) + 1, end - first]
    for low, high in pairwise(bounds):
        pieces = [
            placed(read_records(folder, name, KEY, run[low], run[high]), part)
            for part, (name, runs) in enumerate(zip(names, ranges, strict=True))
            for run in runs
        ]
        keys = np.concatenate(pieces)
        yield keys[np.lexsort((keys["low"], keys["high"]))]  # stable: equal keys stay in the order of places


def placed(records: np.ndarray, part: int) -> np.ndarray:
    """Returns the keys of a part with their documents' places instead of rows."""
    keys = np.empty(len(records), PLACED)
    keys["high"], keys["low"] = records["high"], records["low"]
    keys["place"] = records["row"] + np.uint64(part << ROW_BITS)
    return keys


def copies(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (place, first place, high half of the key) of those sorted keys that are not the first of their value."""
    begins = np.ones(len(keys), bool)
    begins[1:] = (keys["high"][1:] != keys["high"][:-1]) | (keys["low"][1:] != keys["low"][:-1])
    first = np.maximum.accumulate(np.where(begins, np.arange(len(keys)), 0))
    later = ~begins
    return keys["place"][later], keys["place"][first[later]], keys["high"][later]
