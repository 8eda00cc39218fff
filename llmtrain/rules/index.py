"""Checks the section `index`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from glob import has_magic
from importlib.util import find_spec

from llmtrain.config.retrieval import StoreConfig
from llmtrain.rules.case import Case, Rules, command, here


def _library(case: Case) -> Iterator[str]:
    if find_spec("bm25s") is None:
        yield "index: needs bm25s, which is not installed; pip install 'llmtrain[search]' -c constraints.txt"


def _documents(case: Case) -> Iterator[str]:
    documents = case.config.index.documents
    if not documents:
        yield "index.documents: is empty; list files, directories or globs of text, Markdown, JSONL, Parquet or CSV"
    for number, each in enumerate(documents):
        if not has_magic(each.path) and case.missing(each.path):  # what a glob finds is seen when it is read
            at = f"index.documents.{each.name or number}.path={each.path}"
            yield f"{at}: does not exist; give a file, directory or glob"
    names = [each.name for each in documents if each.name is not None]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"index.documents: two are called {name!r}; give one another `name`"


def _passages(case: Case) -> Iterator[str]:
    index = case.config.index
    if 2 * index.passage_overlap >= index.passage_size:
        yield (
            f"index.passage_overlap={index.passage_overlap}: must be less than half of "
            f"index.passage_size={index.passage_size}; lower it"
        )


def _models(case: Case) -> Iterator[str]:
    index = case.config.index
    for key, path in (("model", index.model), ("tokenizer", index.tokenizer)):
        if path is not None and not os.path.isdir(path) and case.missing(path):
            yield f"index.{key}={path}: does not exist; give a Hugging Face directory, or a name on the hub"
    for key in ("query_prefix", "passage_prefix"):
        if getattr(index, key) and index.model is None:
            yield f"index.{key}={getattr(index, key)!r}: is for an encoder; set index.model, or remove it"
    directory = index.tokenizer or index.model
    if index.unit == "characters":
        if index.tokenizer is not None:
            yield f"index.tokenizer={directory}: counts nothing with unit=characters; set unit=tokens, or drop it"
        return
    if directory is None:
        yield "index.unit=tokens: of which tokenizer; set index.tokenizer or index.model"
    elif os.path.isdir(directory) and not os.path.isfile(os.path.join(directory, "tokenizer.json")):
        yield f"index.unit=tokens: {directory} has no tokenizer.json; give index.tokenizer, a directory that has one"


def store_faults(case: Case, key: str, asked: StoreConfig) -> Iterator[str]:
    """Yields what keeps a store from being searched: it is not there, or bm25s is not. `key` is that of the section."""
    if case.missing(asked.store):
        yield f"{key}.store={asked.store}: does not exist; make it with `llmtrain index`, or give another"
    if not case.planned and find_spec("bm25s") is None:
        yield f"{key}: needs bm25s, which is not installed; pip install 'llmtrain[search]' -c constraints.txt"


INDEX_RULES: Rules = (
    (here(command("index")), _library),
    *((command("index"), rule) for rule in (_documents, _passages, _models)),
)
