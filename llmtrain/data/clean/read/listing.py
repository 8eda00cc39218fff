"""Lists the files of an input. No link below its folder is followed, and no device or pipe is taken for a file."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import stat
from collections.abc import Callable, Iterator
from typing import NamedTuple

from llmtrain.config.clean import CollectConfig
from llmtrain.data.clean.read.languages import VENDORED, language_of
from llmtrain.data.clean.read.stream import local_path

ROWS = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv")
ENDINGS = {
    "text": (".txt", ".text"),
    "markdown": (".md", ".markdown"),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "parquet": (".parquet",),
    "csv": (".csv", ".tsv"),
    "warc": (".warc",),
    "wet": (".wet",),
    "html": (".html", ".htm", ".xhtml"),
    "pdf": (".pdf",),
    "dialogue": ROWS,
    "datasets": (".arrow",),
}
MAGIC = re.compile(r"[*?\[]")


class Listed(NamedTuple):
    """Names a file, or something at which no file is read and why."""

    path: str
    reason: str | None = None


def listing(config: CollectConfig) -> list[Listed]:
    """Returns what lies at the path of an input, sorted: all that has an ending of its type below a directory, matches
    of a glob, or the file that it names."""
    if config.type == "pydoc":
        return [Listed("pydoc")]
    path = local_path(config.path)
    if path is None:
        return sorted(remote(config))
    if config.type == "datasets":
        return sorted(saved(path, config)) or [Listed(path)]
    if os.path.isdir(path):
        return sorted(below(path, config, lambda file: fits(file, config.type)))
    if os.path.lexists(path) or not MAGIC.search(path):
        return [Listed(path)]
    return sorted(globbed(path, config))


def fits(path: str, type_: str) -> bool:
    """Returns whether a file has an ending of a type, compressed or not."""
    name = os.path.basename(path).lower()
    if type_ == "code":
        return language_of(name) is not None
    return name.removesuffix(".gz").removesuffix(".zst").endswith(ENDINGS[type_])


def below(root: str, config: CollectConfig, wanted: Callable[[str], bool]) -> Iterator[Listed]:
    """Yields what lies below a directory."""
    folders = [root]
    while folders:
        folder = folders.pop()
        try:
            entries = list(os.scandir(folder))
        except OSError:
            yield Listed(folder, "unreadable")
            continue
        for entry in entries:
            reason = why_not(entry, config, wanted)
            if reason == "folder":
                folders.append(entry.path)
            else:
                yield Listed(entry.path, reason)


def why_not(entry: os.DirEntry, config: CollectConfig, wanted: Callable[[str], bool]) -> str | None:
    """Returns why an entry of a directory is not read, `folder` where its entries are, None for a file to read."""
    if entry.is_symlink():
        return "link"
    if entry.name.startswith("."):
        return "hidden"
    if entry.is_dir(follow_symlinks=False):
        return "vendored" if config.type == "code" and entry.name.lower() in VENDORED else "folder"
    if not entry.is_file(follow_symlinks=False):
        return "not_a_file"
    return None if wanted(entry.path) else "other_ending"


def globbed(pattern: str, config: CollectConfig) -> Iterator[Listed]:
    """Yields what matches a glob, in which `**` stands for any folders. Python's own follows links, without an end."""
    from fsspec.utils import glob_translate

    root = pattern[: MAGIC.search(pattern).start()].rpartition("/")[0] or ("/" if pattern.startswith("/") else ".")
    matches = re.compile(glob_translate(os.path.normpath(pattern))).match
    found = below(root, config, lambda file: True)
    return (each for each in found if matches(os.path.normpath(each.path)))


def saved(directory: str, config: CollectConfig) -> Iterator[Listed]:
    """Yields the files of a split that `save_to_disk` of datasets wrote, none where the directory is none of its."""
    for folder in (directory, os.path.join(directory, config.split)):
        try:
            with open(os.path.join(folder, "state.json"), encoding="utf-8") as state:
                names = [file["filename"] for file in json.load(state)["_data_files"]]
        except (OSError, ValueError, LookupError, TypeError):
            continue
        for name in names:
            path = os.path.join(folder, os.path.basename(name))
            yield Listed(path, "link" if os.path.islink(path) else None)
        return


def remote(config: CollectConfig) -> Iterator[Listed]:
    """Yields the files at a URL that fsspec reads."""
    import fsspec

    files, path = fsspec.core.url_to_fs(config.path)
    if files.isdir(path):
        for file in files.find(path):
            hidden = any(part.startswith(".") for part in file.removeprefix(path).split("/"))
            reason = "hidden" if hidden else None if fits(file, config.type) else "other_ending"
            yield Listed(files.unstrip_protocol(file), reason)
    elif MAGIC.search(path):
        yield from (Listed(files.unstrip_protocol(name)) for name in files.glob(path))
    else:
        yield Listed(files.unstrip_protocol(path), None if files.exists(path) else "vanished")


def is_regular(path: str) -> bool:
    """Returns whether a regular file lies at a path, links followed."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False


def fingerprint(config: CollectConfig) -> str:
    """Returns a hash of the names, sizes and times of an input's files, of remote ones of the names alone, "" where
    there is none: whether they are those of another time is seen without reading them."""
    if config.type == "pydoc":
        return f"Python {platform.python_version()}"
    lines = []
    for path in (each.path for each in listing(config) if each.reason is None):
        local = local_path(path)
        if local is None or (
            config.type == "datasets" and not os.path.lexists(local)
        ):  # elsewhere, or a name of the hub
            lines.append(f"{path}\n")
        elif os.path.exists(local):
            state = os.stat(local)
            lines.append(f"{path}\0{state.st_size}\0{state.st_mtime_ns}\n")
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest() if lines else ""
