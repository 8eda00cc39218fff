"""Implements `llmtrain index`: makes a store of the user's documents, which `search`, `eval` and `chat` read."""

from __future__ import annotations

import os
from typing import Any

from llmtrain.config.schema import Config
from llmtrain.data.search.build import build, identity, is_made, listed_files
from llmtrain.observe.locks import making
from llmtrain.observe.log import log, make_run_dir
from llmtrain.observe.owned import check_target, replacing
from llmtrain.parallel.device import rank_device

COMMAND = "llmtrain index"


def main(config: Config) -> None:
    """Writes the store, whole or not at all, unless it is there already.

    Raises ValueError with all faults of the documents, when the directory holds what this command did not write, and
    when it holds a store of other documents or settings without `index.rebuild`.
    """
    index, target = config.index, store_dir(config)
    make_run_dir(config.directory)
    files = listed_files(index)
    with making(target):
        check_target(target, COMMAND)
        wanted = identity(index, files)
        if is_made(target, wanted, index.rebuild):
            log(f"{target}: is up to date, nothing to do")
            return
        with replacing(target, COMMAND) as directory:
            manifest = build(index, files, wanted, directory, str(rank_device()))
    tell(target, manifest)


def store_dir(config: Config) -> str:
    """Returns the directory of the store."""
    return config.index.path or os.path.join(config.directory, "store")


def tell(target: str, manifest: dict[str, Any]) -> None:
    """Says what was written, and what of the documents is not found, or not wholly."""
    if manifest["empty_documents"]:
        log(f"{manifest['empty_documents']} documents without text are left out")
    if manifest.get("cut_by_encoder"):
        log(
            f"{manifest['cut_by_encoder']} passages are longer than the {manifest['encoder_max_tokens']} tokens that "
            "index.model reads: only their beginning is embedded; lower index.passage_size"
        )
    log(f"{manifest['passages']} passages of {manifest['documents']} documents, {manifest['words']} words, in {target}")
