"""Packs whole documents of a source into rows by best fit, longest first (arXiv 2404.10830): few are cut, little is
padded.

A document of L tokens is L - 1 positions of a row, as its last token is a label only. One that needs more than a row is
cut into pieces, all full but the last; the label of a piece's last position is the first token of the next piece, so
that every token but a document's first is trained once. The plan is a function of the lengths of the documents and of
the row alone, so all ranks have the same.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

KEPT_PIECES = 1_000_000  # a plan of more pieces is kept in a file beside the shards, which the ranks share
VERSION = 1  # of the plan: another one gives other rows


@dataclass(frozen=True)
class Plan:
    """Says which pieces lie in which row. Row r has the pieces `rows[r]` to `rows[r + 1] - 1`."""

    starts: np.ndarray  # [pieces] int64: first token of a piece
    lengths: np.ndarray  # [pieces] int32: its positions
    rows: np.ndarray  # [rows + 1] int64
    positions: int  # of all pieces

    def __len__(self) -> int:
        """Returns the number of rows."""
        return len(self.rows) - 1

    def padding(self, seq_len: int) -> float:
        """Returns the share of the positions of rows of `seq_len` that hold nothing."""
        return 1 - self.positions / max(1, len(self) * seq_len)


def plan_rows(offsets: np.ndarray, seq_len: int, directory: str) -> Plan:
    """Returns the plan of the documents between these offsets, from a file in `directory` where a large one was made
    before. Where none can be written there, every rank holds its own."""
    if (len(offsets) - 1) + int(offsets[-1]) // seq_len < KEPT_PIECES:
        return made(offsets, seq_len)
    digest = hashlib.blake2b(f"{VERSION} {seq_len} ".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(offsets).data)
    stem = os.path.join(directory, f".llmtrain-rows-{digest.hexdigest()}")
    if (kept := opened(stem)) is not None:
        return kept
    plan = made(offsets, seq_len)
    with suppress(OSError):
        for name in ("starts", "lengths", "rows"):
            save(f"{stem}-{name}.npy", getattr(plan, name))
        return opened(stem) or plan
    return plan


def opened(stem: str) -> Plan | None:
    """Returns the plan that was kept, mapped; None where there is none."""
    with suppress(FileNotFoundError):
        starts, lengths, rows = (
            np.load(f"{stem}-{name}.npy", mmap_mode="r", allow_pickle=False) for name in ("starts", "lengths", "rows")
        )
        return Plan(starts, lengths, rows, int(lengths.sum(dtype=np.int64)))
    return None


def save(path: str, array: np.ndarray) -> None:
    """Writes an array under its name at once, so that others see all of it or nothing."""
    unfinished = Path(f"{path}.{secrets.token_hex(4)}.part")
    try:
        with open(unfinished, "wb") as file:
            np.save(file, array, allow_pickle=False)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def made(offsets: np.ndarray, seq_len: int) -> Plan:
    """Returns the plan, computed."""
    starts, lengths = pieces(np.asarray(offsets, np.int64), seq_len)
    order = np.argsort(-lengths, kind="stable")
    row = fitted(np.bincount(lengths, minlength=seq_len + 1), seq_len)
    order = order[np.argsort(row, kind="stable")]
    rows = np.concatenate([[0], np.cumsum(np.bincount(row))]).astype(np.int64) if len(row) else np.zeros(1, np.int64)
    return Plan(starts[order], lengths[order], rows, int(lengths.sum(dtype=np.int64)))


def pieces(offsets: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (first token, positions) of the pieces of all documents, in their order. Example: offsets [0, 6, 7] and
    rows of 4 give ([0, 4], [4, 1]): a document of one token has no position."""
    positions = np.diff(offsets) - 1
    count = -(-positions // seq_len)
    number = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)  # of the piece in its document
    starts = np.repeat(offsets[:-1], count) + number * seq_len
    lengths = np.minimum(seq_len, np.repeat(positions, count) - number * seq_len)
    return starts, lengths.astype(np.int32)


def fitted(counts: np.ndarray, seq_len: int) -> np.ndarray:
    """Returns the row of each piece, where `counts[n]` pieces have n positions and the pieces are in falling order.

    It is what putting one piece after the other into the fullest row with room gives; rows alike are filled together.
    """
    row = np.empty(int(counts[1:].sum()), np.int64)
    free: dict[int, list[np.ndarray]] = {}  # rows by their free positions
    room = 0  # bit n is set where rows have n free positions
    done = made_rows = 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length]) if length else 0
        while left:
            above = room >> length
            if above:
                gap = length + (above & -above).bit_length() - 1
                chosen = np.concatenate(free.pop(gap))
                room &= ~(1 << gap)
            else:
                gap = seq_len
                chosen = made_rows + np.arange(-(-left // (seq_len // length)))
                made_rows += len(chosen)
            each = min(gap // length, left)  # pieces in a row that is filled
            full = min(len(chosen), left // each)
            last = min(1, len(chosen) - full, left - full * each)  # a row that the pieces left over do not fill
            taken = full * each + (left - full * each if last else 0)
            row[done : done + taken] = np.repeat(chosen[: full + last], each)[:taken]
            done, left = done + taken, left - taken
            rest = taken - full * each
            for gap_now, rows in (
                (gap - each * length, chosen[:full]),
                (gap - rest * length, chosen[full : full + last]),
                (gap, chosen[full + last :]),
            ):
                if gap_now and len(rows):
                    free.setdefault(gap_now, []).append(rows)
                    room |= 1 << gap_now
    return row


def row_of(plan: Plan, row: int, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns (tokens, labels, positions, piece) of every position of a row, without padding."""
    first, end = int(plan.rows[row]), int(plan.rows[row + 1])
    starts, lengths = plan.starts[first:end], plan.lengths[first:end].astype(np.int64)
    spans = list(zip(starts.tolist(), (starts + lengths).tolist(), strict=True))
    ids = np.concatenate([tokens[start:stop] for start, stop in spans])
    labels = np.concatenate([tokens[start + 1 : stop + 1] for start, stop in spans])
    before = np.cumsum(lengths) - lengths
    positions = np.arange(len(ids)) - np.repeat(before, lengths)
    return ids, labels, positions, np.repeat(np.arange(len(lengths)), lengths)
