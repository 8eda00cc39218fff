"""Collects drawn hostile files under limits of memory and time, and prints what became of them as JSON.

`python -m tests.data.clean.hostile COUNT SEED`. Each input is a valid file of a type that was damaged: cut, bits
turned, parts exchanged, repeated or taken from another type, NULs put in, nested, a bomb, compressed before or after.
"""

from __future__ import annotations

import gzip
import json
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import zstandard

from tests.data.clean.members import COMPRESSIONS, MEMBERS, collected, dropped

MEMORY_BYTES = 1_000_000_000  # of this process, with Arrow's pool the system's; that of PDF and Parquet has as much
BATCH_FILES = 25
KEYS = {"max_bytes": 100_000, "timeout_s": 10.0, "max_memory_bytes": MEMORY_BYTES, "max_copy_bytes": 1_000_000}


def cut(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data) + 1)]


def bits_turned(data: bytes, draw: random.Random) -> bytes:
    turned = bytearray(data)
    for _ in range(draw.choice([1, 2, 8, 64]) if data else 0):
        turned[draw.randrange(len(turned))] ^= 1 << draw.randrange(8)
    return bytes(turned)


def spliced(data: bytes, draw: random.Random) -> bytes:
    """A piece of any member, put at any place."""
    other = draw.choice(list(MEMBERS.values()))[1]
    start, at = draw.randrange(len(other)), draw.randrange(len(data) + 1)
    return data[:at] + other[start : start + draw.randrange(1, 200)] + data[at + draw.choice([0, 0, 20]) :]


def repeated(data: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(data) + 1)
    piece = data[start : start + draw.randrange(1, 40)]
    return data[:start] + piece * draw.choice([2, 100, 5000]) + data[start:]


def nul(data: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(data) + 1)
    return (
        data[:at]
        + draw.choice([b"\0", b"\xff", b"\xed\xa0\x80", b"\r", b"\n", b'"']) * draw.choice([1, 3, 1000])
        + data[at:]
    )


def nested(data: bytes, draw: random.Random) -> bytes:
    at, depth = draw.randrange(len(data) + 1), draw.choice([100, 5000, 40_000])
    return data[:at] + draw.choice([b"[", b'{"a":', b"<div>", b"<<", b"(", b'"text":[']) * depth + data[at:]


def bomb(data: bytes, draw: random.Random) -> bytes:
    filled = data[: draw.randrange(len(data) + 1)] + draw.choice([b" ", b"\0", b"\n", b"a", b'[["'])[:1] * 60_000_000
    return draw.choice([gzip.compress(filled, 1), zstandard.compress(filled)])


def number_changed(data: bytes, draw: random.Random) -> bytes:
    """Lengths and places in a file, made wrong."""
    digits = [i for i, byte in enumerate(data) if 48 <= byte < 58]
    at = draw.choice(digits) if digits else 0
    return data[:at] + draw.choice([b"-1", b"0", b"9", b"99999999999999999999", b"7"]) + data[at + 1 :]


DAMAGES = (cut, bits_turned, spliced, repeated, nul, nested, number_changed)


def damaged(data: bytes, draw: random.Random) -> bytes:
    """Returns a member damaged once to four times, in one of 200 cases a bomb; before or after it is compressed."""
    compress = draw.choice([*COMPRESSIONS.values(), COMPRESSIONS[""]])
    early = draw.random() < 0.5
    data = data if early else compress(data)
    for _ in range(draw.randint(1, 4)):
        data = draw.choice(DAMAGES)(data, draw)
    if draw.random() < 0.005:
        return bomb(data, draw)
    return compress(data) if early else data


def batch(type_: str, files: int, draw: random.Random) -> Counter[str]:
    """Returns what became of some files of a type. Asserts that every one gave a document or a reason, that documents
    are valid and small, and that of lines of JSON none is lost."""
    name = MEMBERS[type_][0]
    with tempfile.TemporaryDirectory() as directory:
        written = {}
        for i in range(files):
            path = Path(directory) / f"{i:03}{name}{draw.choice(list(COMPRESSIONS)) if type_ != 'code' else ''}"
            written[str(path)] = damaged(MEMBERS[type_][1], draw)
            path.write_bytes(written[str(path)])
        documents, counts, examples = collected(type_, directory, **KEYS)
    seen = {each.metadata["file"] for each in documents + examples}
    assert seen == written.keys(), written.keys() - seen
    assert counts["documents_out"] == len(documents) and sum(dropped(counts).values()) == len(examples)
    for document in documents:
        assert (
            document.text.strip() and len(document.text.encode()) < 4 * KEYS["max_bytes"] and "\0" not in document.text
        )
        json.dumps(document.metadata, ensure_ascii=False).encode()
    if type_ == "jsonl":
        rows = Counter(each.metadata["file"] for each in documents + examples)
        for path, data in written.items():
            lines = sum(bool(line.strip()) for line in data.split(b"\n"))
            if path.endswith("jsonl") and not data.startswith((b"\x1f\x8b", b"\x28\xb5")) and data.lstrip()[:1] != b"[":
                assert rows[path] == max(lines, 1), (path, rows[path], lines)
    return Counter({f"{type_}/{key}": count for key, count in counts.items() if key != "bytes_out"})


def peak_bytes() -> int:
    """Returns the most memory that this process has held; what resource says of it is also the parent's."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def main(count: int, seed: int) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    draw, total, slowest_s = random.Random(seed), Counter(), 0.0
    for i in range(count // BATCH_FILES):
        start = time.monotonic()
        total += batch(list(MEMBERS)[i % len(MEMBERS)], BATCH_FILES, draw)
        slowest_s = max(slowest_s, time.monotonic() - start)
    print(json.dumps({"slowest_batch_s": slowest_s, "peak_bytes": peak_bytes(), "counts": dict(sorted(total.items()))}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
