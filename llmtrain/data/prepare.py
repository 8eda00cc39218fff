"""Prepares data once for a configuration: writes problem sets, the tokenizer and token shards."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from llmtrain.config.rows import split_path
from llmtrain.config.schema import DataConfig, SourceConfig, TokenizerConfig
from llmtrain.config.specials import sentinels
from llmtrain.data.clean.run import check_unchanged, clean, clean_dir, identity
from llmtrain.data.faults import Faults
from llmtrain.data.files import read_rows
from llmtrain.data.megatron import export_megatron
from llmtrain.data.shards import (
    ENDS,
    MANIFEST,
    ONLY_TRAINING,
    SPLITS,
    shard_files,
    split_documents,
    verify_shards,
    write_shards,
)
from llmtrain.data.tasks import write_task
from llmtrain.data.tokenizer import Tokenizer, load_tokenizer
from llmtrain.data.tokenizer_base import tokenizer_from_base
from llmtrain.data.tokenizer_train import train_tokenizer
from llmtrain.observe.contents import CACHE, Checksums, files_at
from llmtrain.observe.files import linked, write_whole
from llmtrain.observe.locks import making
from llmtrain.observe.owned import filling

MARKER = "prepared.json"  # written last: all else is there
UNWRITTEN = {"path", "chat_template", "chat_template_kwargs"}  # keys of the tokenizer that shards do not depend on
PIECES = ".llmtrain-pieces"  # folder of what is tokenized so far
EXCERPT_CHARS = 20_000  # characters of a document that train the tokenizer at most: variety over length


def prepare(data: DataConfig, tokenizer: TokenizerConfig, data_dir: str, tokenizer_dir: str, seed: int) -> None:
    """Writes the tasks and shards of `data` into `data_dir`, and trains the tokenizer unless `tokenizer_dir` exists.

    What was done before is not done again; a run that was killed goes on with what it had not tokenized. Raises
    ValueError when `data_dir` was made with another configuration, tokenizer or contents of the sources, or holds files
    of these names that we did not write; when another job prepares it; when there is neither a tokenizer nor text to
    train one; and with `data.verify` when a shard is not what was written.
    """
    settings, data = relevant(data, tokenizer, seed), with_paths(data, data_dir)
    if not is_prepared(data_dir, tokenizer_dir, settings, data, tokenizer):
        with making(os.path.join(data_dir, MARKER)):
            if not is_prepared(data_dir, tokenizer_dir, settings, data, tokenizer):
                clean(data, data_dir, seed)
                _prepare(data, tokenizer, data_dir, tokenizer_dir, seed, settings)
    if data.sources and data.verify:
        verify_shards(data_dir)
    if data.sources and data.megatron:
        with making(os.path.join(data_dir, MARKER)):
            export_megatron(data_dir)


def _prepare(
    data: DataConfig, tokenizer: TokenizerConfig, data_dir: str, tokenizer_dir: str, seed: int, settings: dict[str, Any]
) -> None:
    read, pieces = contents(data, tokenizer, data_dir, tokenizer_dir), os.path.join(data_dir, PIECES)
    with filling(data_dir, "llmtrain data", written_names(data)) as staging, progress_bar() as progress:
        for task in data.tasks:
            with shown(progress, f"task {task.name}"):
                write_task(task, str(staging), seed)
        loaded = make_tokenizer(data, tokenizer, str(staging), tokenizer_dir, seed, progress)
        if data.sources:
            with shown(progress, "tokens") as row:
                report, sources = partial(show_bytes, progress, row), data.sources
                write_shards(sources, loaded, pieces, seed, report, data.workers, json.dumps(read, sort_keys=True))
            for path in shard_files(pieces):
                linked(path, os.path.join(staging, os.path.basename(path)))
    write_marker(data_dir, settings | {"tokenizer": loaded.fingerprint, "contents": read})
    shutil.rmtree(pieces, ignore_errors=True)


def with_paths(data: DataConfig, data_dir: str) -> DataConfig:
    """Returns the section with the paths of cleaned sources written out."""
    cleaned = os.path.join(clean_dir(data, data_dir), "documents")
    sources = [
        source.model_copy(update={"path": os.path.join(cleaned, source.name)})
        if source.type == "cleaned" and source.path is None
        else source
        for source in data.sources
    ]
    return data.model_copy(update={"sources": sources})


def written_names(data: DataConfig) -> list[str]:
    """Returns the names of the files that are written into the data directory."""
    tasks = [f"{task.name}-{split}.jsonl" for task in data.tasks for split in SPLITS]
    shards = [f"{source.name}-{split}{end}" for source in data.sources for split in SPLITS for end in ENDS]
    return [*tasks, *shards, *([MANIFEST] if data.sources else [])]


def contents(data: DataConfig, tokenizer: TokenizerConfig, data_dir: str, tokenizer_dir: str) -> dict[str, str]:
    """Returns the checksums of what is read: by key, of those files that are there, but for what we write ourselves."""
    paths = {f"data.sources.{source.name}": split_path(source.path)[0] for source in data.sources if source.path}
    paths |= {"tokenizer.base": tokenizer.base} if tokenizer.base else {}
    checksums = Checksums(os.path.join(data_dir, CACHE))
    written = {os.path.abspath(os.path.join(data_dir, name)) for name in (*written_names(data), MARKER)}
    written |= set(map(os.path.abspath, files_at(tokenizer_dir)))
    found = {}
    for key, path in paths.items():
        if files := [file for file in files_at(path) if os.path.abspath(file) not in written]:
            found[key] = checksums.of_all(files)
    checksums.save()
    return found


def progress_bar() -> Progress:
    columns = (SpinnerColumn(finished_text="✓"), TextColumn("{task.description}"), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True))


@contextmanager
def shown(progress: Progress, description: str) -> Iterator[TaskID]:
    """Shows a line in the display and ticks it off at the end."""
    row = progress.add_task(description, total=None)
    yield row
    progress.update(row, total=1, completed=1, description=description)


def show_bytes(progress: Progress, row: TaskID, source: str, text_bytes: int) -> None:
    progress.update(row, description=f"tokens: {source}, {text_bytes / 1e6:.1f} MB")


def relevant(data: DataConfig, tokenizer: TokenizerConfig, seed: int) -> dict[str, Any]:
    """Returns a hash of the settings that the written bytes depend on. The shares of the sources apply only in
    training."""
    # Keys added later are hashed only where they differ from the default, so that older directories stay valid.
    sources = [
        source.model_dump(exclude={"field", *ONLY_TRAINING})
        | source.model_dump(include={"field"}, exclude_defaults=True)
        for source in data.sources
    ]
    tasks = [task.model_dump() for task in data.tasks]
    trained = tokenizer.model_dump(include={"vocab_size", "train_bytes"})
    trained |= tokenizer.model_dump(exclude=UNWRITTEN, exclude_defaults=True)
    cleaned = [identity(data, seed)] if data.collect else []
    text = json.dumps([sources, tasks, trained, seed, *sentinels(data), *cleaned], sort_keys=True)
    return {"config": hashlib.sha256(text.encode()).hexdigest()}


def is_prepared(
    data_dir: str, tokenizer_dir: str, settings: dict[str, Any], data: DataConfig, tokenizer: TokenizerConfig
) -> bool:
    """Returns whether the data is prepared. Raises ValueError when it was prepared with other settings, or from other
    contents of files that are still there."""
    marker = Path(data_dir, MARKER)
    if not marker.is_file():
        return False
    done = json.loads(marker.read_text())
    remedy = f"give another data.path (and tokenizer.path), or delete {data_dir} and {tokenizer_dir}"
    if done["config"] != settings["config"]:
        cleaned = ", or cleaned by an earlier version" if data.collect else ""
        raise ValueError(f"{data_dir} was made with other data, tokenizer or seed settings{cleaned}; {remedy}")
    if done["tokenizer"] != load_tokenizer(tokenizer_dir).fingerprint:
        raise ValueError(f"{data_dir} was made with another tokenizer than {tokenizer_dir}; {remedy}")
    now = contents(data, tokenizer, data_dir, tokenizer_dir)
    if changed := [key for key, was in done.get("contents", {}).items() if now.get(key, was) != was]:
        raise ValueError(f"{data_dir} was made from other contents of {', '.join(changed)}; {remedy}")
    check_unchanged(data, data_dir)
    return True


def make_tokenizer(
    data: DataConfig, config: TokenizerConfig, data_dir: str, tokenizer_dir: str, seed: int, progress: Progress
) -> Tokenizer:
    """Returns the tokenizer of the directory, made first if that does not exist: from `config.base`, or by training."""
    if _is_empty(tokenizer_dir):
        with making(tokenizer_dir):
            if _is_empty(tokenizer_dir):  # not made by another job meanwhile
                _make_tokenizer(data, config, data_dir, tokenizer_dir, seed, progress)
    return load_tokenizer(tokenizer_dir)


def _is_empty(directory: str) -> bool:
    return not os.path.exists(directory) or (os.path.isdir(directory) and not os.listdir(directory))


def _make_tokenizer(
    data: DataConfig, config: TokenizerConfig, data_dir: str, tokenizer_dir: str, seed: int, progress: Progress
) -> None:
    if not data.sources and not config.base:
        raise ValueError(f"{tokenizer_dir}: no tokenizer there, and no data.sources to train one from")
    with shown(progress, "tokenizer"):
        if config.base:
            tokenizer_from_base(tokenizer_dir, config, data)
        else:
            train_tokenizer(tokenizer_texts(data, config, data_dir, seed), tokenizer_dir, config, data)


def tokenizer_texts(data: DataConfig, config: TokenizerConfig, data_dir: str, seed: int) -> Iterator[str]:
    """Yields training text, the same share of `train_bytes` from each source, and the plain prompts of the tasks."""
    share = config.train_bytes // len(data.sources)
    yield from chain.from_iterable(excerpts(source, share, seed) for source in data.sources)
    for task in data.tasks:
        path = os.path.join(data_dir, f"{task.name}-train.jsonl")
        for _, line in read_rows(path, Faults(path)):
            yield line.get("prompt", "") + line.get("completion", "")


def excerpts(source: SourceConfig, max_bytes: int, seed: int) -> Iterator[str]:
    """Yields the beginnings of training documents, about `max_bytes` in all."""
    left = max_bytes
    for split, text in split_documents(source, seed):
        if left <= 0:
            return
        if split == "train":
            left -= len(text[:EXCERPT_CHARS].encode())
            yield text[:EXCERPT_CHARS]


def write_marker(data_dir: str, content: dict[str, Any]) -> None:
    """Writes the marker by a rename, last: it exists only when everything else does."""
    write_whole(Path(data_dir, MARKER), json.dumps(content, indent=2) + "\n")
