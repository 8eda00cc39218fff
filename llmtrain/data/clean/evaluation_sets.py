"""Finds the sets of problems that documents evaluate on, and indexes their n-grams and those of held-out text."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmtrain.config.clean.content import ContaminationConfig
from llmtrain.config.schema import DataConfig
from llmtrain.data.clean.ngrams import WORD, Gathered, ngram_hashes, word_hashes
from llmtrain.data.faults import Faults
from llmtrain.data.files import read_rows

HASHED = ".ngrams.npz"  # end of a file that holds a set's n-grams, by the number of their words, in place of its rows


def evaluation_sets(documents: Iterable[tuple[DataConfig, str]], more: Mapping[str, str]) -> dict[str, str]:
    """Returns the paths of all sets of rows that documents evaluate on, by a name: `data.held_out`, what is held out of
    the tasks, and `more`.

    `documents`: the section `data` of each (a run's stages have several) and its directory, where tasks are written.
    """
    found = dict(more)
    for data, directory in documents:
        written = [(f"task-{task.name}", f"{task.name}-held_out.jsonl") for task in data.tasks if task.held_out]
        paths = [(name, os.path.join(directory, file)) for name, file in written]
        paths += [("held_out", data.held_out)] if data.held_out else []
        for name, path in paths:
            if path not in found.values():
                found[free_name(name, found)] = path
    return found


def free_name(name: str, taken: Mapping[str, str]) -> str:
    """Returns the name, with a number behind it where it is taken."""
    numbered = (name if number == 1 else f"{name}-{number}" for number in range(1, len(taken) + 2))
    return next(each for each in numbered if each not in taken)


@dataclass
class Index:
    """Holds sorted hashes by the number of their words, and to which set each belongs (of several, the first)."""

    names: list[str]
    hashes: dict[int, np.ndarray] = field(default_factory=dict)
    owners: dict[int, np.ndarray] = field(default_factory=dict)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)  # by set: rows, ngrams, rows_too_short


def build_index(settings: ContaminationConfig) -> Index:
    """Returns the index of `settings.sets`. Raises ValueError when a set cannot be read, or they hold too much."""
    index, parts, total = Index(list(settings.sets)), list[tuple[int, int, np.ndarray]](), 0
    for number, (name, path) in enumerate(settings.sets.items()):
        found, index.counts[name] = hashes_of(name, path, settings)
        parts += [(words, number, hashes) for words, hashes in found.items()]
        total += 0 if path.endswith(HASHED) else index.counts[name]["ngrams"]
        if total > settings.max_ngrams:
            raise ValueError(
                f"data.clean.contamination.max_ngrams={settings.max_ngrams}: the sets up to {name!r} hold {total} "
                "n-grams; raise it, or give smaller sets"
            )
    for words in {words for words, _, _ in parts}:
        own = [(number, hashes) for each, number, hashes in parts if each == words]
        index.hashes[words], first = np.unique(np.concatenate([hashes for _, hashes in own]), return_index=True)
        index.owners[words] = np.repeat([number for number, _ in own], [len(hashes) for _, hashes in own])[first]
    return index


def hashes_of(name: str, path: str, settings: ContaminationConfig) -> tuple[dict[int, np.ndarray], dict[str, int]]:
    """Returns the hashes of a set by the number of their words, and what was counted. Raises ValueError when it is
    missing, or a row is broken."""
    if path.endswith(HASHED):
        with np.load(path, allow_pickle=False) as arrays:
            found = {int(words): arrays[words] for words in arrays.files}
        return found, {"ngrams": sum(map(len, found.values()))}
    n = settings.n_by_set.get(name, settings.n)
    return set_hashes(rows_of(name, path), n, settings.min_words, settings.templates)


def rows_of(name: str, path: str) -> list[dict[str, Any]]:
    """Returns the rows of a set. Raises ValueError when it is missing, or a row is broken."""
    faults = Faults(path)
    try:
        rows = [row for _, row in read_rows(path, faults)]
    except ValueError as error:
        raise ValueError(f"data.clean.contamination: set {name!r}: {error}") from None
    faults.raise_any()
    return rows


def set_hashes(
    rows: Iterable[dict[str, Any]], n: int, min_words: int, templates: int, most: int | None = None
) -> tuple[dict[int, np.ndarray], dict[str, int]]:
    """Returns the hashes of a set by the number of their words, without those of more than `templates` rows, and what
    was counted. Of more than `most` hashes one in `one_in`, a power of two, is returned."""
    gathered, counts = Gathered(most), {"rows": 0, "rows_too_short": 0}
    for row in rows:
        own = row_hashes(row, n, min_words)
        counts["rows"] += 1
        counts["rows_too_short"] += not own
        gathered.add(own)
    gathered.settle()
    found = {words: hashes[in_rows <= templates] for words, (hashes, in_rows) in gathered.held.items()}
    return found, counts | {"ngrams": sum(map(len, found.values())), "one_in": gathered.one_in}


def row_hashes(row: dict[str, Any], n: int, min_words: int) -> dict[int, np.ndarray]:
    """Returns the hashes of a row's texts, each once: of all n-grams, or of a whole text that is shorter."""
    found: dict[int, list[np.ndarray]] = {}
    for text in texts_of(row):
        hashes = word_hashes(WORD.findall(unicodedata.normalize("NFC", text)))
        if len(hashes) >= min(n, min_words):
            words = min(n, len(hashes))
            found.setdefault(words, []).append(ngram_hashes(hashes, words))
    return {words: np.unique(np.concatenate(hashes)) for words, hashes in found.items()}


def texts_of(value: Any) -> Iterator[str]:
    """Yields all texts in a row, whatever its fields are called: problem, answer, turns, worked solutions."""
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, str):
            yield each
        elif isinstance(each, dict):
            waiting += each.values()
        elif isinstance(each, list):
            waiting += each
