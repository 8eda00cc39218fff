"""Writing a checkpoint: every rank what it owns, then one rename that makes it whole."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator

from torch import Tensor

from llmtrain.checkpoint.files import FileEntry, safetensors_chunks, sync_directory, write_durably, write_json
from llmtrain.checkpoint.group import CheckpointGroup, together
from llmtrain.checkpoint.layout import STATE, Stored, by_name, index_file, read_index, tensor_file
from llmtrain.checkpoint.manifest import list_checkpoints, write_manifest
from llmtrain.checkpoint.rng import random_state
from llmtrain.engine.base import Engine

LEFTOVER = re.compile(r"step-\d+(\.old)?\.(tmp|trash)")  # of an attempt that did not end


def save_checkpoint(directory: str, engine: Engine, state: dict, group: CheckpointGroup, keep: int) -> str:
    """Save to `directory`/step-<state["step"]> and return that path; a collective over `group`.

    `state` is JSON and comes back as `CheckpointReader.state`. Of the steps up to this one the newest `keep` stay.
    A directory without a suffix is whole: whatever dies on the way, the last one stays usable.
    Raises OSError on every rank, naming rank and file, when one of them cannot write; ValueError when the
    fragments do not cover every parameter exactly once.
    """
    final = os.path.join(directory, f"step-{state['step']:08d}")
    partial = final + ".tmp"

    def on_first(action: Callable[..., None], *args: object) -> None:
        together(group, lambda: action(*args) if group.rank == 0 else None)

    on_first(_prepare, directory, partial)
    try:
        entries = together(group, lambda: _write_rank(partial, engine, group.rank))
        files = {name: entry for entries_of_rank in entries for name, entry in entries_of_rank.items()}
        on_first(_complete, partial, state, files, group.size)
    except (OSError, ValueError):
        if group.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)  # a full disk must not stay full
        raise
    on_first(_publish, partial, final)
    on_first(_prune, directory, final, keep)
    return final


def _prepare(directory: str, partial: str) -> None:
    os.makedirs(directory, exist_ok=True)
    for name in filter(LEFTOVER.fullmatch, os.listdir(directory)):
        shutil.rmtree(os.path.join(directory, name))
    os.mkdir(partial)


def _write_rank(path: str, engine: Engine, rank: int) -> dict[str, FileEntry]:
    """This rank's two files; their names with size and checksum."""
    # Two passes over the fragments, which are views or cheap copies: the header comes first and needs all sizes.
    stored = [Stored(f.address, tuple(f.tensors), rank, number) for number, f in enumerate(engine.fragments())]
    numels = {s.tensor_name(key): s.address.numel for s in stored for key in s.keys}
    index = {"fragments": [s.to_json() for s in stored], "random": random_state()}
    tensors, addresses = tensor_file(path, rank), index_file(path, rank)
    return {
        os.path.basename(tensors): write_durably(tensors, safetensors_chunks(numels, _named(engine, rank))),
        os.path.basename(addresses): write_durably(addresses, [json.dumps(index).encode()]),
    }


def _named(engine: Engine, rank: int) -> Iterator[tuple[str, Tensor]]:
    for number, fragment in enumerate(engine.fragments()):
        stored = Stored(fragment.address, tuple(fragment.tensors), rank, number)
        for key, tensor in fragment.tensors.items():
            yield stored.tensor_name(key), tensor


def _complete(path: str, state: dict, files: dict[str, FileEntry], num_ranks: int) -> None:
    """Check that nothing is lost or doubled, add the trainer's state, and write the manifest."""
    by_name(stored for rank in range(num_ranks) for stored in read_index(path, rank)[0])
    entry = write_json(os.path.join(path, STATE), state)
    write_manifest(path, {**files, STATE: entry})
    sync_directory(path)


def _publish(partial: str, final: str) -> None:
    """The rename. One of the same step steps aside first and counts as a checkpoint until it is replaced."""
    if os.path.isdir(final):
        _discard(final + ".old")
        os.rename(final, final + ".old")
    os.rename(partial, final)
    sync_directory(os.path.dirname(final))


def _prune(directory: str, final: str, keep: int) -> None:
    """Steps after this one are not touched: the run may have gone back, and which is wanted is not ours to say."""
    _discard(final + ".old")
    checkpoints = list_checkpoints(directory)
    for path in checkpoints[: checkpoints.index(final) + 1][:-keep]:
        _discard(path)


def _discard(path: str) -> None:
    """Renamed first, so that a half-deleted directory never looks whole."""
    if os.path.isdir(path):
        os.rename(path, path + ".trash")
        shutil.rmtree(path + ".trash")
