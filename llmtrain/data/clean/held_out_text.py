"""Indexes the text that `data.sources` hold out, on which perplexity is measured.

Which documents that are follows from the settings, so there need be no shards yet.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmtrain.config.clean.content import ContaminationConfig
from llmtrain.config.data import SourceConfig
from llmtrain.data.clean.evaluation_sets import HASHED, set_hashes
from llmtrain.data.shards import split_documents
from llmtrain.observe.log import log


def holding_out(sources: Sequence[SourceConfig], root: str) -> list[SourceConfig]:
    """Returns the sources whose held-out text is there before the job of `root` cleans: all but those that read what it
    writes, whose documents are held out after copies were dropped."""
    return [source for source in sources if source.held_out and not reads(source, root)]


def reads(source: SourceConfig, root: str) -> bool:
    """Returns whether a source reads what the job of a directory writes."""
    if source.path is None:
        return source.type == "cleaned"
    return Path(os.path.realpath(root)) in Path(os.path.realpath(source.path), "x").parents


def write_held_out(
    sources: Sequence[SourceConfig], seed: int, settings: ContaminationConfig, directory: str
) -> dict[str, str]:
    """Writes the n-grams of what each source holds out into `directory`, at most `settings.text_ngrams` in all; returns
    the files by the names of the sets, `text-SOURCE`. Raises ValueError when a source cannot be read."""
    paths = {f"text-{source.name}": os.path.join(directory, f"text-{source.name}{HASHED}") for source in sources}
    for source, (name, path) in zip(sources, paths.items(), strict=True):
        n, most = settings.n_by_set.get(name, settings.n), settings.text_ngrams // len(sources)
        found, counts = set_hashes(held_out(source, seed), n, settings.min_words, settings.templates, most)
        if counts["one_in"] > 1:
            log(
                f"data.clean.contamination.text_ngrams={settings.text_ngrams}: of what data.sources.{source.name} "
                f"holds out, one n-gram in {counts['one_in']} is looked up"
            )
        os.makedirs(directory, exist_ok=True)
        np.savez(path, **{str(words): hashes for words, hashes in found.items()})
    return paths


def held_out(source: SourceConfig, seed: int) -> Iterator[dict[str, Any]]:
    """Yields the documents that a source holds out, as rows."""
    return ({"text": text} for split, text in split_documents(source, seed) if split == "held_out")
