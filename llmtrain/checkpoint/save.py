"""Writes a checkpoint: every rank writes what it owns, then one rename makes it whole."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llmtrain.checkpoint.files import FileEntry, safetensors_chunks, write_durably, write_json
from llmtrain.checkpoint.group import CheckpointGroup, together
from llmtrain.checkpoint.layout import (
    STATE,
    StoredFragment,
    by_name,
    check_complete,
    index_file,
    read_index,
    tensor_file,
)
from llmtrain.checkpoint.manifest import list_checkpoints, write_manifest
from llmtrain.checkpoint.rng import random_state
from llmtrain.engine.base import Engine
from llmtrain.observe.files import sync

logger = logging.getLogger(__name__)

LEFTOVER = re.compile(r"step-\d+(\.old)?\.(tmp|trash)")  # left by a save that was interrupted
OWN_FILES = re.compile(r"(rank-\d+\.(safetensors|json)|state\.json|manifest\.(json|sha256)|\.nfs\w+)")

Shapes = Mapping[str, tuple[int, ...]]
"""Canonical names map to global shapes of every parameter of the model (`model.decoder.parameter_shapes`)."""


@dataclass
class Snapshot:
    """Holds what one rank writes: its fragments, their flat fp32 tensors by `StoredFragment.tensor_name`, and its
    random state."""

    fragments: list[StoredFragment]
    tensors: dict[str, Tensor]
    random: dict

    def index(self) -> bytes:
        """Returns the content of the index file."""
        return json.dumps({"fragments": [f.to_json() for f in self.fragments], "random": self.random}).encode()


def take(engine: Engine, rank: int) -> Snapshot:
    """Returns this rank's fragments, as the engine yields them, and its random state.

    Raises ValueError when a tensor is not the one its address describes.
    """
    fragments, tensors = [], {}
    for number, fragment in enumerate(engine.fragments()):
        stored = StoredFragment(fragment.address, tuple(fragment.tensors), rank, number)
        fragments.append(stored)
        for key, tensor in fragment.tensors.items():
            name, numel = stored.tensor_name(key), fragment.address.numel
            if tensor.dtype != torch.float32 or tuple(tensor.shape) != (numel,):
                raise ValueError(
                    f"fragment {name}: {tensor.dtype} {tuple(tensor.shape)}; the rule is flat torch.float32 of the "
                    f"{numel} elements its address names"
                )
            tensors[name] = tensor.detach()
    return Snapshot(fragments, tensors, random_state())


def save_checkpoint(
    directory: str, engine: Engine, state: dict, group: CheckpointGroup, keep: int, shapes: Shapes
) -> str:
    """Saves what the engine holds now, see `write_checkpoint`."""
    return write_checkpoint(directory, lambda: take(engine, group.rank), state, group, keep, shapes)


def write_checkpoint(
    directory: str, snapshot: Callable[[], Snapshot], state: dict, group: CheckpointGroup, keep: int, shapes: Shapes
) -> str:
    """Saves to `directory`/step-<state["step"]> and returns that path; a collective over `group`.

    `state` is JSON and comes back as `CheckpointReader.state`. Of the checkpoints up to this step the newest `keep`
    stay; a warning names older ones that cannot be removed. A directory without a suffix is always whole: if the save
    is interrupted, the last checkpoint stays usable. Raises OSError on every rank, naming rank and file, when one of
    them cannot write; ValueError when the fragments do not cover every parameter of `shapes` exactly once.
    """
    final = os.path.join(directory, f"step-{state['step']:08d}")
    partial = final + ".tmp"

    def on_first(action: Callable[..., None], *args: object) -> None:
        together(group, lambda: action(*args) if group.rank == 0 else None)

    on_first(_prepare, directory, partial)
    try:
        entries = together(group, lambda: _write_rank(partial, snapshot(), group.rank))
        files = {name: entry for entries_of_rank in entries for name, entry in entries_of_rank.items()}
        on_first(_complete, partial, state, files, group.size, shapes)
        on_first(_publish, partial, final)
    except (OSError, ValueError):
        if group.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)  # a full disk must not stay full
        raise
    try:
        on_first(_prune, directory, final, keep)
    except OSError as error:  # this checkpoint is whole nevertheless
        if group.rank == 0:
            logger.warning("%s is saved, but the ones before it could not be removed: %s", final, error)
    return final


def _prepare(directory: str, partial: str) -> None:
    os.makedirs(directory, exist_ok=True)
    for name in filter(LEFTOVER.fullmatch, os.listdir(directory)):
        if _is_ours(os.path.join(directory, name)):
            shutil.rmtree(os.path.join(directory, name), ignore_errors=True)  # NFS keeps files that are still open
    os.mkdir(partial)


def _write_rank(path: str, snapshot: Snapshot, rank: int) -> dict[str, FileEntry]:
    """Writes this rank's two files; returns their names with size and checksum."""
    tensors, index = tensor_file(path, rank), index_file(path, rank)
    return {
        os.path.basename(tensors): write_durably(tensors, safetensors_chunks(snapshot.tensors)),
        os.path.basename(index): write_durably(index, [snapshot.index()]),
    }


def _complete(path: str, state: dict, files: dict[str, FileEntry], num_ranks: int, shapes: Shapes) -> None:
    """Checks that the fragments cover the model, adds the trainer's state, and writes the manifest."""
    check_complete(by_name(stored for rank in range(num_ranks) for stored in read_index(path, rank)[0]), shapes)
    entry = write_json(os.path.join(path, STATE), state)
    write_manifest(path, {**files, STATE: entry})
    sync(path)


def _publish(partial: str, final: str) -> None:
    """Renames the partial directory to the final one.

    An existing checkpoint of the same step is renamed to .old first, and counts as a checkpoint until it is replaced.
    """
    if os.path.isdir(final):
        _discard(final + ".old")
        os.rename(final, final + ".old")
    os.rename(partial, final)
    sync(os.path.dirname(final))


def _prune(directory: str, final: str, keep: int) -> None:
    """Removes old checkpoints. Those of later steps stay: the run may have gone back, and the user may want either."""
    _discard(final + ".old")
    checkpoints = list_checkpoints(directory)
    for path in checkpoints[: checkpoints.index(final) + 1][:-keep]:
        _discard(path)


def _is_ours(path: str) -> bool:
    """Says whether a directory holds nothing but what a save writes: what a user put beside it must not go."""
    return os.path.isdir(path) and not os.path.islink(path) and all(map(OWN_FILES.fullmatch, os.listdir(path)))


def _discard(path: str) -> None:
    """Removes a directory of ours. It is renamed first, so that a half-deleted directory never looks whole."""
    if _is_ours(path):
        os.rename(path, path + ".trash")
        shutil.rmtree(path + ".trash")
