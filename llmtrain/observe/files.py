"""Writes single files so that a kill or a power failure leaves the old one or the new one, whole."""

from __future__ import annotations

import os
import secrets
import shutil
from contextlib import suppress
from pathlib import Path


def write_whole(path: str | Path, text: str) -> None:
    """Writes a file under a unique name, flushes it to the disk, and renames it; a link is written through."""
    place = os.path.realpath(path)
    unfinished = os.path.join(os.path.dirname(place), f".llmtrain-{secrets.token_hex(4)}.part")
    try:
        with open(unfinished, "x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, place)
    except BaseException:
        with suppress(OSError):
            os.unlink(unfinished)
        raise
    sync(os.path.dirname(place))


def sync(path: str | Path) -> None:
    """Makes a file, or the entries of a directory (new files, renames), survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def linked(path: str | Path, other: str | Path) -> None:
    """Gives a file a second name, or where the file system has none of these, a copy."""
    try:
        os.link(path, other)
    except OSError:
        shutil.copyfile(path, other)
