"""Computes checksums of files and directories, so that a run notices when what it reads has changed.

Files of up to WHOLE_BYTES are read whole, and have the checksum that `sha256sum` prints; of larger ones size and
BLOCKS evenly spaced blocks are (64 MiB). A file that still has the size, times and inode of the last look is not read
again.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from llmtrain.config.rows import matches
from llmtrain.observe.files import write_whole

WHOLE_BYTES = 2**30
BLOCKS, BLOCK_BYTES = 1024, 2**16
SETTLED_NS = 2 * 10**9  # a file changed so recently may change again without a new time
CACHE = ".llmtrain-checksums.json"  # in a run directory


def file_digest(path: str | Path) -> str:
    """Returns the checksum of one file, in hexadecimal digits."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        if size <= WHOLE_BYTES:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(str(size).encode())
        for block in range(BLOCKS):
            file.seek((size - BLOCK_BYTES) * block // (BLOCKS - 1))
            digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()


def files_at(path: str) -> list[str]:
    """Returns the files that a path means, sorted: itself, all below a directory, or the matches of a pattern."""
    pattern = os.path.join(glob.escape(path), "**") if os.path.isdir(path) else path
    return [found for found in matches(pattern) if os.path.isfile(found)]


class Checksums:
    """Holds the checksums of files that were seen before, kept in the file `path` (None: in memory alone)."""

    def __init__(self, path: str | None = None) -> None:
        self.path, self.known, self.changed = path, dict[str, list](), False
        if path is not None:
            with suppress(OSError, ValueError):
                self.known = dict(json.loads(Path(path).read_text(encoding="utf-8")))

    def of(self, path: str) -> str:
        """Returns the checksum of a file, from memory where its size, times and inode are those of the last look."""
        stat = os.stat(path)
        seen = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        key = os.path.abspath(path)
        if self.known.get(key, [None])[:-1] == seen:
            return self.known[key][-1]
        digest = file_digest(path)
        if time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > SETTLED_NS:
            self.known[key], self.changed = [*seen, digest], True
        return digest

    def save(self) -> None:
        """Writes the file again if there is something new; where it cannot be written, all is read again next time."""
        if self.path is not None and self.changed:
            with suppress(OSError):
                write_whole(self.path, json.dumps(self.known, indent=1) + "\n")

    def of_all(self, paths: Iterable[str]) -> str:
        """Returns the checksum of one file, or a checksum over the names and checksums of several."""
        paths = list(paths)
        if len(paths) == 1:
            return self.of(paths[0])
        lines = (f"{self.of(path)}  {os.path.basename(path)}\n" for path in paths)
        return hashlib.sha256("".join(lines).encode()).hexdigest()
