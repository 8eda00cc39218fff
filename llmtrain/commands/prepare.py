"""Implements `llmtrain data` and `llmtrain tokenizer`."""

from __future__ import annotations

import os

from llmtrain.config.schema import Config
from llmtrain.config.tasks import tasks_of
from llmtrain.data.clean.run import check_held_out
from llmtrain.data.prepare import make_tokenizer, prepare, progress_bar, with_paths
from llmtrain.observe.locks import locked
from llmtrain.observe.log import log, make_run_dir
from llmtrain.trainer.job import data_dir, tokenizer_dir, with_tasks


def data(config: Config) -> None:
    """Makes problem sets, tokenizer and token shards, as the data section says."""
    make_run_dir(config.directory)
    with locked(config.directory):
        section = with_tasks(config)
        if section.collect:
            check_held_out(section, data_dir(config))
            tell_unseen(config)
        prepare(section, config.tokenizer, data_dir(config), tokenizer_dir(config), config.seed)
    log(f"data in {data_dir(config)}, tokenizer in {tokenizer_dir(config)}")


def tell_unseen(config: Config) -> None:
    """Says which tasks of evaluations cleaning does not look for: those on the hub, and those of the harness."""
    unseen = [task.label for task in tasks_of(config.eval.tasks) if task.data and task.data.repo]
    if config.data.clean.contamination and (names := [*unseen, *config.eval.lm_eval.tasks]):
        log(
            f"cleaning does not look for the rows of {', '.join(names)}, whose files it does not know; give them as "
            "data.clean.contamination.sets"
        )


def dry_run(config: Config) -> None:
    """Shows what each step of cleaning does to a sample, and what other thresholds would keep; writes nothing.

    Raises ValueError when there is nothing to collect, or an input cannot be read.
    """
    if not config.data.collect:
        raise ValueError("data.collect: is empty, so --dry-run has nothing to look at; list inputs of raw documents")
    from rich.console import Console

    from llmtrain.data.clean.collect import Collect, refuse_unreadable
    from llmtrain.data.clean.dry_run import dry_run as tried
    from llmtrain.data.clean.dry_run import shown
    from llmtrain.data.clean.run import clean_dir, resolve

    for each in config.data.collect:
        refuse_unreadable(each)
    unwritten = {"tasks": [], "sources": []}  # of which what is held out is written by cleaning
    data, place = with_tasks(config).model_copy(update=unwritten), data_dir(config)
    clean = resolve(data, place, os.path.abspath(clean_dir(data, place)), config.seed)
    Console().print(shown(tried(clean, data.collect, clean.dry_run_documents, Collect)))


def tokenizer(config: Config) -> None:
    """Makes the tokenizer alone, from the data section's sources."""
    make_run_dir(config.directory)
    sources = with_paths(config.data.model_copy(update={"tasks": []}), data_dir(config))
    with locked(config.directory), progress_bar() as bar:
        make_tokenizer(sources, config.tokenizer, data_dir(config), tokenizer_dir(config), config.seed, bar)
    log(f"tokenizer in {tokenizer_dir(config)}")
