"""Writes directories and files so that nothing of the user's is lost: what llmtrain did not write is never replaced.

A directory that a later command may replace holds MARKER, which says who made it, from what and when, and lists every
file with size and checksum. It is made whole under a unique name first, and what it replaces stays until then. A
directory that holds anything else, or a file of ours that was changed since, is refused. Links are followed.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import IO, Any

from llmtrain.observe.contents import file_digest
from llmtrain.observe.files import sync, write_whole

MARKER = ".llmtrain.json"
# What `llmtrain run` keeps in the directory of a stage, into which the stage may write too.
STAGE_FILES = {"stage.yaml", "done.json", "spent.json", ".llmtrain.lock"}
RUN_RECORD = "run.json"  # in the directory of a run that trains
LEFTOVER = re.compile(r"\.llmtrain-[0-9a-f]{8}\.(tmp|old)")  # names of ours while a directory is written or replaced
SHOWN = 3  # names in a message


@contextmanager
def replacing(directory: str | Path, command: str, source: str | None = None) -> Iterator[Path]:
    """Yields a new directory to write into, which takes the place of `directory` when the block ends well.

    `command` and `source` (the run or model that it is made from) are for the marker. Raises ValueError as
    `check_target` does.
    """
    target = check_target(directory, command, source)
    inside = _must_stay(target)
    with _staging(target, target if inside else target.parent, command, source) as (staging, marker):
        yield staging
        _seal(staging, marker)
        (_move_in if inside else _swap)(staging, target)


@contextmanager
def filling(directory: str | Path, command: str, names: Iterable[str]) -> Iterator[Path]:
    """Yields a new directory; when the block ends well, the files in it move into `directory`, which may hold others.

    Raises ValueError when one of `names`, the files that the block will write, is there and not ours.
    """
    target = _resolved(directory)
    _check_names(directory, target, names)
    with _staging(target, target, command, None) as (staging, marker):
        yield staging
        _seal(staging, marker)
        written = read_marker(staging)
        _check_names(directory, target, written["files"])
        files = {**read_marker(target).get("files", {}), **written["files"]}
        write_whole(target / MARKER, json.dumps({**written, "files": files}, indent=1) + "\n")
        for name in written["files"]:
            os.replace(staging / name, target / name)
        shutil.rmtree(staging, ignore_errors=True)
        sync(target)


def adopt(directory: Path, command: str, names: Iterable[str]) -> None:
    """Marks files that an earlier version wrote as ours, where there is no marker yet."""
    if not read_marker(directory):
        files = {name: _described(directory / name) for name in names if (directory / name).is_file()}
        write_whole(directory / MARKER, json.dumps({"made_by": command, "files": files}, indent=1) + "\n")


def check_target(directory: str | Path, command: str, source: str | None = None) -> Path:
    """Returns the place that a directory to be written by `command` means, links followed.

    Raises ValueError, with the remedy, when it is a file, a link that leads nowhere, a run or a part of its
    checkpoints, `source` itself or a folder around it, or holds anything that this command did not write.
    """
    target = _resolved(directory)
    origin = None if source is None else Path(os.path.realpath(source))
    if origin is not None and (target == origin or target in origin.parents):
        raise ValueError(f"{directory}: would replace {source}, from which it is made; choose another directory")
    if run := _run_around(target):
        raise ValueError(f"{directory}: belongs to the run in {run}; choose another directory")
    maker = read_marker(target).get("made_by", command)
    if maker != command:
        raise ValueError(f"{directory}: was made by `{maker}`, not by `{command}`; choose another directory")
    if target.is_dir():
        _remove_leftovers(target, target)
        _refuse_others(directory, foreign(target))
    return target


def foreign(directory: Path, ignore: str = "") -> list[str]:
    """Returns some of the names in a directory, `ignore` and STAGE_FILES left out, that we did not write, or that were
    changed since."""
    listed, left_out = read_marker(directory).get("files", {}), {ignore, *STAGE_FILES}
    if not listed:
        return [name for name in sorted(os.listdir(directory)) if name not in left_out][: SHOWN + 1]
    names = (name for name in _entries(directory) if Path(name).parts[0] not in {MARKER, *left_out})
    return list(islice((name for name in names if not unchanged(directory / name, listed.get(name))), SHOWN + 1))


def is_run(directory: str | Path) -> bool:
    """Says whether a directory is that of a run that trains, of this version or an earlier one."""
    written = [os.path.lexists(os.path.join(directory, name)) for name in ("config.yaml", "checkpoints")]
    return os.path.isfile(os.path.join(directory, RUN_RECORD)) or all(written)


def read_marker(directory: Path) -> dict[str, Any]:
    """Returns what the marker of a directory says, {} where there is none of ours."""
    with suppress(OSError, ValueError):
        content = json.loads((directory / MARKER).read_text(encoding="utf-8"))
        if isinstance(content, dict) and isinstance(content.get("files", {}), dict):
            return content
    return {}


def _resolved(directory: str | Path) -> Path:
    """Returns the place behind all links. Raises ValueError when nothing can be written there."""
    target = Path(os.path.realpath(directory))
    try:
        if target.is_symlink():
            raise ValueError(f"{directory}: is a link that leads back to itself; remove it")
        if target.exists() and not target.is_dir():
            raise ValueError(f"{directory}: is a file, and a directory is to be written; choose another path")
    except OSError as error:
        raise _unwritable(directory, error) from None
    if os.path.islink(str(directory).rstrip("/")) and not target.parent.is_dir():
        raise ValueError(f"{directory}: is a link to {target}, and there is no {target.parent}; make that folder first")
    return target


def _unwritable(directory: str | Path, error: OSError) -> ValueError:
    return ValueError(f"{directory}: cannot be written: {error.strerror}; choose another directory")


def _run_around(target: Path) -> Path | None:
    """Returns the run that the target is, or in whose checkpoints it lies."""
    if is_run(target):
        return target
    return next((p.parent for p in (target, *target.parents) if p.name == "checkpoints" and is_run(p.parent)), None)


def _must_stay(target: Path) -> bool:
    """Says whether a directory is filled in place of being exchanged for another: an empty one, a mount, that of a
    stage, one that a user is in, and one whose parent is not ours to write."""
    if not target.is_dir():
        return False
    there, here = set(os.listdir(target)), Path.cwd()
    used = not there or bool(there & STAGE_FILES) or target in (here, *here.parents)
    return used or os.path.ismount(target) or not os.access(target.parent, os.W_OK)


@contextmanager
def _staging(target: Path, folder: Path, command: str, source: str | None) -> Iterator[tuple[Path, IO[str]]]:
    """Yields a new directory in `folder` and its marker, which is locked while we write. Removes it on failure."""
    staging = folder / f".llmtrain-{secrets.token_hex(4)}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder, target)
        staging.mkdir()
    except OSError as error:
        raise _unwritable(target, error) from None
    try:
        with open(staging / MARKER, "w+", encoding="utf-8") as marker:
            _lock(marker)
            made = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            origin = None if source is None else os.path.abspath(source)
            _write_marker(marker, {"made_by": command, "from": origin, "made": made, "target": str(target)})
            yield staging, marker
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _seal(staging: Path, marker: IO[str]) -> None:
    """Flushes all files to the disk and lists them in the marker."""
    files = {}
    for name in sorted(_entries(staging)):
        if name != MARKER:
            sync(staging / name)
            files[name] = _described(staging / name)
    _write_marker(marker, {**read_marker(staging), "files": files})
    for folder, _, _ in os.walk(staging):
        sync(folder)


def _write_marker(marker: IO[str], content: dict[str, Any]) -> None:
    marker.seek(0)
    marker.truncate()
    marker.write(json.dumps(content, indent=1) + "\n")
    marker.flush()
    os.fsync(marker.fileno())


def _swap(staging: Path, target: Path) -> None:
    """Renames the new directory to the target; what is there stays under another name until then."""
    old = staging.with_suffix(".old")
    if target.exists():
        shutil.copymode(target, staging)
        os.rename(target, old)
    try:
        if old.exists():
            _refuse_others(target, foreign(old))  # what came between the check and the rename
        os.rename(staging, target)
    except BaseException:
        if old.exists():
            os.rename(old, target)
        raise
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _move_in(staging: Path, target: Path) -> None:
    """Replaces what the target holds of ours by the new entries. After a kill at any moment its marker lists what it
    holds, so that the next command can go on."""
    _refuse_others(target, foreign(target, ignore=staging.name))
    for name in {Path(name).parts[0] for name in read_marker(target).get("files", {})}:
        _remove(target / name)
    write_whole(target / MARKER, (staging / MARKER).read_text(encoding="utf-8"))
    for name in os.listdir(staging):
        if name != MARKER:
            os.rename(staging / name, target / name)
    sync(target)
    shutil.rmtree(staging, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _remove_leftovers(folder: Path, target: Path) -> None:
    """Removes what an earlier write of this target left when it was killed; a replaced one whose successor is missing
    comes back."""
    for name in filter(LEFTOVER.fullmatch, os.listdir(folder)):
        leftover = folder / name
        if read_marker(leftover).get("target") != str(target):
            continue
        with open(leftover / MARKER, encoding="utf-8") as marker:
            if not _lock(marker):
                continue  # another job is at work
            if name.endswith(".old") and not target.exists():
                os.rename(leftover, target)
            else:
                shutil.rmtree(leftover, ignore_errors=True)


def _lock(file: IO[str]) -> bool:
    """Returns False when another process holds the file."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _check_names(directory: str | Path, target: Path, names: Iterable[str]) -> None:
    listed = read_marker(target).get("files", {})
    there = (name for name in names if os.path.lexists(target / name))
    _refuse_others(directory, [name for name in there if not unchanged(target / name, listed.get(name))])


def _refuse_others(directory: str | Path, names: list[str]) -> None:
    if names:
        shown = ", ".join(names[:SHOWN]) + (" and more" if len(names) > SHOWN else "")
        raise ValueError(
            f"{directory}: holds {shown}, which llmtrain did not write, or not as it is now; nothing is replaced: "
            "choose an empty or new directory, or move it away"
        )


def _entries(directory: Path) -> Iterator[str]:
    """Yields the relative paths of all files and links, and of folders that hold nothing."""
    for folder, folders, files in os.walk(directory):
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        for name in (*files, *links):
            yield os.path.relpath(os.path.join(folder, name), directory)
        if not files and not folders and Path(folder) != directory:
            yield os.path.relpath(folder, directory)


def unchanged(path: Path, listed: list | None) -> bool:
    """Says whether a file is as a marker lists it."""
    if listed is None or path.is_symlink() or not path.is_file():
        return False
    return path.stat().st_size == listed[0] and _described(path) == listed


def _described(path: Path) -> list:
    """Returns what the marker says of a file: its size and checksum."""
    return [path.stat().st_size, file_digest(path)]
