"""Says what the path of a file of rows means: a file, a directory, a glob, or a data set of the Hugging Face hub."""

from __future__ import annotations

import glob
import os

from llmtrain.config.hub import is_name

FORMATS = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv")
COMPRESSIONS = (".gz", ".zst")


def split_path(path: str) -> tuple[str, tuple[str, ...]]:
    """Returns the path or name, and what follows it behind colons: the split, or configuration and split.

    Example: "openai/gsm8k:main:train" -> ("openai/gsm8k", ("main", "train"))
    """
    if there(path):
        return path, ()
    name, *parts = path.split(":")
    return name, tuple(parts)


def there(path: str) -> bool:
    """Returns whether something lies at the path, or matches it as a glob."""
    return bool(matches(path))


def matches(path: str) -> list[str]:
    """Returns the path itself if something lies there, even with `*`, `?` or `[` in its name; else, sorted, what
    matches it as a glob."""
    return [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))


def dangling(path: str) -> str | None:
    """Returns what is wrong with a link that leads to nothing, None for anything else."""
    if os.path.exists(path) or not os.path.islink(path):
        return None
    return f"is a link to {os.readlink(path)}, which is not there; mend the link or give another path"


def is_hub_name(name: str) -> bool:
    """Returns whether a name, at which nothing lies, can be that of a data set of the hub: `owner/name`."""
    return is_name(name) and not name.endswith((*FORMATS, *COMPRESSIONS))
