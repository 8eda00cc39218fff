"""Reads the points of scaling laws from CSV files, or from the metrics.jsonl of a run."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

SHOWN = 20  # faults that are written out; the rest is counted
SIGNED = ("reward",)  # columns that may be zero or negative; of all others there are logarithms
LEAST, MOST = 1e-30, 1e60  # of the others: beyond, what laws and plots compute of them is no number any more
GAP = 1.05  # budgets closer than this factor are one


@dataclass(frozen=True)
class Points:
    """Holds one run an entry; all arrays are [points]."""

    params: np.ndarray
    tokens: np.ndarray
    flops: np.ndarray
    loss: np.ndarray

    def __len__(self) -> int:
        return len(self.loss)

    def __getitem__(self, rows: np.ndarray) -> Points:
        return Points(self.params[rows], self.tokens[rows], self.flops[rows], self.loss[rows])


def read_points(path: str, fields: Mapping[str, str]) -> Points:
    """Returns the points of a CSV file with a header; `fields` maps our column names to those of the file.

    A file without FLOPs has 6 x params x tokens. Raises ValueError with all faults, `file:line: what; remedy`.
    """
    names = ("params", "tokens", "loss", "flops")
    columns = read_columns(path, names, fields, optional=() if "flops" in fields else ("flops",))
    columns.setdefault("flops", 6 * columns["params"] * columns["tokens"])
    return Points(**columns)


def read_columns(
    path: str, names: Sequence[str], fields: Mapping[str, str], optional: Sequence[str] = ()
) -> dict[str, np.ndarray]:
    """Returns columns of numbers by our names, of a CSV file or one of JSON objects (.jsonl). Raises ValueError as
    `read_points` does."""
    header, rows = _objects(path) if path.endswith(".jsonl") else _rows(path)
    found = {name: fields.get(name, name) for name in names if name not in optional or name in header}
    there = ", ".join(header) or "none"
    faults = [
        f"{path}:1: has no column {column}; its columns are {there}, name yours in scaling.fields.{name}"
        for name, column in found.items()
        if column not in header
    ]
    faults += [
        f"{path}:1: has two columns {column}; rename one" for column in found.values() if header.count(column) > 1
    ]
    if faults:
        raise ValueError("\n".join(faults))
    if not rows:
        raise ValueError(f"{path}: has no points; write one a line below the header")
    for line, row in rows:
        if len(row) != len(header):
            faults.append(f"{path}:{line}: has {len(row)} fields, the header has {len(header)}; correct it")
            continue
        faults += [
            f"{path}:{line}: {column}={row[header.index(column)]!r}: must be a {_kind(name)}; correct or remove it"
            for name, column in found.items()
            if not _is_number(row[header.index(column)], name)
        ]
    _raise_any(path, faults)
    return {name: np.array([float(row[header.index(column)]) for _, row in rows]) for name, column in found.items()}


def _rows(path: str) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Returns the header and (line, fields) of each row that is not empty."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip() for name in next(reader, [])]
            return header, [(reader.line_num, row) for row in reader if any(field.strip() for field in row)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: is no CSV file in UTF-8: {error}") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}; name a CSV file in scaling.points") from None


def _objects(path: str) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Returns the keys of the first object, and (line, fields) of each object; '' where one lacks a key."""
    header, rows = list[str](), list[tuple[int, list[str]]]()
    try:
        with open(path, encoding="utf-8") as file:
            for line, text in enumerate(file, 1):
                found = json.loads(text)
                if not isinstance(found, dict):
                    raise TypeError(f"it is a {type(found).__name__}")
                header = header or list(found)
                rows.append((line, [str(found.get(name, "")) for name in header]))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}:{len(rows) + 1}: is no JSON object: {error}; correct or remove the line") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}; name a file in scaling.points") from None
    return header, rows


def _kind(name: str) -> str:
    return "finite number" if name in SIGNED else f"positive number, from {LEAST:g} to {MOST:g}"


def _is_number(text: str, name: str) -> bool:
    try:
        return math.isfinite(float(text)) if name in SIGNED else LEAST <= float(text) <= MOST
    except ValueError:
        return False


def _raise_any(path: str, faults: Sequence[str]) -> None:
    if not faults:
        return
    more = f", of which the first {SHOWN} are shown" if len(faults) > SHOWN else ""
    raise ValueError(
        "\n".join([*faults[:SHOWN], *([f"{path}: {len(faults)} faults{more}"] if len(faults) > 1 else [])])
    )


def budgets_of(flops: np.ndarray) -> list[np.ndarray]:
    """Returns the rows of each budget, the smallest first. Budgets that lie within a factor of GAP of their neighbour
    are one: those of runs that stop at a whole step differ a little."""
    order = np.argsort(flops, kind="stable")
    cuts = np.flatnonzero(np.diff(np.log(flops[order])) > math.log(GAP)) + 1
    return np.split(order, cuts)
