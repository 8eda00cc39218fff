"""Marks a checkpoint directory as whole by a list of its files with sizes and checksums, itself checksummed."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re

from llmtrain.checkpoint.files import FileEntry, write_durably, write_json
from llmtrain.checkpoint.group import CheckpointGroup, LocalGroup

MANIFEST = "manifest.json"
MANIFEST_SUM = "manifest.sha256"  # in the form of `sha256sum`
WHOLE = re.compile(r"step-(\d{8,})(\.old)?")  # .old: it was being replaced by another of the same step

logger = logging.getLogger(__name__)


def write_manifest(path: str, files: dict[str, FileEntry]) -> None:
    """Lists `files` of the directory `path` in manifest.json, and writes its checksum to manifest.sha256."""
    entry = write_json(os.path.join(path, MANIFEST), {"format": 1, "files": dict(sorted(files.items()))})
    write_durably(os.path.join(path, MANIFEST_SUM), [_sum_line(entry["sha256"])])


def verify(path: str, group: CheckpointGroup | None = None) -> None:
    """Checks the checksum of every file of a checkpoint directory, each rank its share.

    Raises ValueError on every rank, naming the file that is missing, truncated or changed.
    """
    group = group or LocalGroup()
    problems = group.all_gather_json(_first_problem(path, group.rank, group.size))
    for problem in problems:
        if problem is not None:
            raise ValueError(f"{problem}; this checkpoint cannot be trusted, use another one")


def read_manifest(path: str) -> dict[str, FileEntry]:
    """Returns the files of a checkpoint directory. Raises ValueError when the manifest does not match its checksum."""
    manifest, checksum = os.path.join(path, MANIFEST), os.path.join(path, MANIFEST_SUM)
    with open(manifest, "rb") as f, open(checksum, "rb") as g:
        content, line = f.read(), g.read()
    if line != _sum_line(hashlib.sha256(content).hexdigest()):
        raise ValueError(f"{manifest}: does not match its checksum in {checksum}")
    return json.loads(content)["files"]


def list_checkpoints(directory: str) -> list[str]:
    """Returns the paths of the checkpoints in `<run>/checkpoints`, oldest step first; none if the directory does not
    exist."""
    if not os.path.isdir(directory):
        return []
    whole = [match for match in map(WHOLE.fullmatch, os.listdir(directory)) if match]
    whole.sort(key=lambda match: (int(match[1]), match[2] is None))
    return [os.path.join(directory, match[0]) for match in whole]


def newest_intact(directory: str, group: CheckpointGroup | None = None) -> str | None:
    """Returns the path of the newest checkpoint that verifies, the same on every rank; warns of each broken one."""
    group = group or LocalGroup()
    # Rank 0's list: a shared file system may show the other ranks an outdated one.
    for path in reversed(group.all_gather_json(list_checkpoints(directory))[0]):
        try:
            verify(path, group)
        except ValueError as e:
            if group.rank == 0:
                logger.warning("%s: falling back to the checkpoint before it", e)
            continue
        return path
    return None


def _first_problem(path: str, rank: int, size: int) -> str | None:
    """Returns what is wrong with this rank's share of the files, None if nothing is."""
    try:
        files = read_manifest(path)
        by_size = sorted(files, key=lambda name: (-files[name]["bytes"], name))
        for name in by_size[rank::size]:
            _check_file(os.path.join(path, name), files[name])
    except ValueError as e:
        return str(e)
    except OSError as e:
        return f"{e.filename or path}: {e.strerror}"
    return None


def _check_file(path: str, entry: FileEntry) -> None:
    size = os.path.getsize(path)
    if size != entry["bytes"]:
        raise ValueError(f"{path}: {size} bytes where the manifest says {entry['bytes']}")
    with open(path, "rb") as f:
        if hashlib.file_digest(f, "sha256").hexdigest() != entry["sha256"]:
            raise ValueError(f"{path}: checksum differs from the manifest")


def _sum_line(sha256: str) -> bytes:
    return f"{sha256}  {MANIFEST}\n".encode()
