"""Implements `llmtrain data` and `llmtrain tokenizer`."""

from __future__ import annotations

from llmtrain.config.schema import Config
from llmtrain.data.prepare import make_tokenizer, prepare, progress_bar, with_paths
from llmtrain.observe.locks import locked
from llmtrain.observe.log import log, make_run_dir
from llmtrain.trainer.job import data_dir, tokenizer_dir


def data(config: Config) -> None:
    """Makes problem sets, tokenizer and token shards, as the data section says."""
    make_run_dir(config.directory)
    with locked(config.directory):
        prepare(config.data, config.tokenizer, data_dir(config), tokenizer_dir(config), config.seed)
    log(f"data in {data_dir(config)}, tokenizer in {tokenizer_dir(config)}")


def tokenizer(config: Config) -> None:
    """Makes the tokenizer alone, from the data section's sources."""
    make_run_dir(config.directory)
    sources = with_paths(config.data.model_copy(update={"tasks": []}), data_dir(config))
    with locked(config.directory), progress_bar() as bar:
        make_tokenizer(sources, config.tokenizer, data_dir(config), tokenizer_dir(config), config.seed, bar)
    log(f"tokenizer in {tokenizer_dir(config)}")
