"""Looks at documents that cleaning wrote: seeded samples, lengths and languages, of a bounded number of them.

Where there are more files or documents than the bound, files are drawn by a fixed seed and each is read from its start,
up to the same number of documents. A file that is still being written is read as far as it goes.
"""

from __future__ import annotations

import io
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import zstandard
from datatrove.data import Document

from llmtrain.config.clean import CleanConfig
from llmtrain.data.clean import pii

SEED = 0
MOST_DOCUMENTS = 20_000  # looked at in a folder
MOST_LINE_BYTES = 2**28  # of a row; a longer one is counted as unreadable
MOST_NAMES = 200  # different languages, kinds or reasons that are counted; others are counted together
MOST_NAME_CHARS = 60
EXCERPT_CHARS = 600
OTHERS = "(others)"


class Reservoir:
    """Keeps `size` of any number of things, each with the same chance, drawn by a fixed seed (algorithm R)."""

    def __init__(self, size: int) -> None:
        self.size, self.seen, self.kept, self.draw = size, 0, list[Any](), random.Random(SEED)

    def add(self, thing: Any) -> None:
        """Offers a thing."""
        self.seen += 1
        if len(self.kept) < self.size:
            self.kept.append(thing)
        elif (place := self.draw.randrange(self.seen)) < self.size:
            self.kept[place] = thing


@dataclass
class Looked:
    """Holds what was seen in the files of a folder. Counts are of the `documents` that were looked at, not of all."""

    files: int = 0
    files_read: int = 0
    documents: int = 0
    unreadable: int = 0  # rows, and files that break off
    lengths: Counter[int] = field(default_factory=Counter)  # by bits of the number of characters: 7 is 64 to 127
    languages: Counter[str] = field(default_factory=Counter)
    pii: Counter[str] = field(default_factory=Counter)  # placeholders by kind
    samples: dict[tuple[str, ...], Reservoir] = field(default_factory=dict)
    found: dict[str, dict[str, Any]] = field(default_factory=dict)  # examples by id that was asked for

    def count(self, counter: Counter[str], name: Any, value: int = 1) -> None:
        """Counts a name, which documents may have chosen, in bounded room."""
        name = visible(str(name), MOST_NAME_CHARS)
        counter[name if name in counter or len(counter) < MOST_NAMES else OTHERS] += value

    def sample(self, key: tuple[str, ...], size: int, example: Mapping[str, Any]) -> None:
        """Offers an example to the sample of a key."""
        key = tuple(visible(part, MOST_NAME_CHARS) for part in key)
        if key in self.samples or len(self.samples) < MOST_NAMES:
            self.samples.setdefault(key, Reservoir(size)).add(example)


def rows_of(paths: Iterable[Path], looked: Looked, most: int = MOST_DOCUMENTS) -> Iterator[dict[str, Any]]:
    """Yields up to about `most` documents of files, and counts in `looked` what was read."""
    paths = sorted(paths)
    looked.files += len(paths)
    random.Random(SEED).shuffle(paths)
    paths = paths[:most]
    each = max(1, most // max(1, len(paths)))
    for path in paths:
        looked.files_read += 1
        for place, row in enumerate(rows_in(path, looked)):
            looked.documents += 1
            yield row
            if place + 1 == each:
                break


def rows_in(path: Path, looked: Looked) -> Iterator[dict[str, Any]]:
    """Yields the documents in a file of JSON lines, compressed by zstandard."""
    with open(path, "rb") as file:
        unpacked = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
        for line in lines_in(io.BufferedReader(unpacked), looked):
            row = None
            with suppress(ValueError, RecursionError):
                row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("metadata", {}), dict):
                yield row
            else:
                looked.unreadable += 1


def lines_in(file: BinaryIO, looked: Looked) -> Iterator[bytes]:
    """Yields lines up to MOST_LINE_BYTES; of longer ones, and from where the file is broken, none."""
    whole = True
    try:
        while line := file.readline(MOST_LINE_BYTES):
            begins, whole = whole, line.endswith(b"\n")
            if begins and (whole or len(line) < MOST_LINE_BYTES):
                yield line
            elif begins:
                looked.unreadable += 1
    except (zstandard.ZstdError, OSError):
        looked.unreadable += 1


def look_at_kept(paths: Iterable[Path], size: int, wanted: Sequence[str] = (), most: int = MOST_DOCUMENTS) -> Looked:
    """Returns lengths, languages, placeholders of personal data and `size` examples of kept documents, and those whose
    ids are wanted."""
    looked, ids = Looked(), set(wanted)
    for row in rows_of(paths, looked, most):
        data, text = row.get("metadata", {}), str(row.get("text", ""))
        looked.lengths[len(text).bit_length()] += 1
        looked.count(looked.languages, data.get("language") or "(unknown)")
        for kind, number in as_mapping(data.get("pii")).items():
            looked.count(looked.pii, kind, number if isinstance(number, int) else 0)
        example = as_example(row)
        looked.sample((), size, example)
        if example["id"] in ids:
            looked.found[example["id"]] = example
    return looked


def look_at_dropped(paths: Iterable[Path], size: int, most: int = MOST_DOCUMENTS) -> Looked:
    """Returns `size` examples by step and reason of documents that were dropped."""
    looked = Looked()
    for row in rows_of(paths, looked, most):
        data = row.get("metadata", {})
        looked.sample((str(data.get("dropped_by")), str(data.get("reason"))), size, as_example(row))
    return looked


def as_example(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the report shows of a document, all of it of bounded length and safe to show."""
    data, text = row.get("metadata", {}), str(row.get("text", ""))
    shown = {key: visible(str(data[key]), 200) for key in ("source", "url", "language", "copy_of") if data.get(key)}
    example = {"id": visible(str(row.get("id", "")), 200), **shown, "chars": len(text)}
    return {**example, "text": visible(text, EXCERPT_CHARS)}


def masked(looked: Looked, clean: CleanConfig) -> Looked:
    """Returns the examples with personal data replaced as in the documents that are kept: those that were dropped never
    reached that step."""
    if clean.pii is not None:
        replace = pii.make(clean.pii, clean.words)
        for example in (each for sample in looked.samples.values() for each in sample.kept):
            document = Document(example["text"], "")
            replace(document)
            example["text"] = document.text
    return looked


def as_mapping(value: Any) -> Mapping[str, Any]:
    """Returns an object as it is, and nothing in place of anything else."""
    return value if isinstance(value, Mapping) else {}


# marks that reorder or hide what stands around them; the others of these kinds are control characters
BIDI = (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0xFEFF)
CONTROLS = (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029, *BIDI)
SHOWN = {code: f"\\u{code:04x}" for code in CONTROLS if chr(code) not in "\n\t"}


def visible(text: str, most: int) -> str:
    """Returns at most `most` characters of a text, with controls and half characters spelled, so that it can neither
    break a page nor reorder what stands around it."""
    cut = text[:most].translate(SHOWN)
    cut = cut.encode("utf-8", "backslashreplace").decode("utf-8")
    return cut + ("…" if len(text) > most else "")
