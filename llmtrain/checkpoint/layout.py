"""Defines which files a checkpoint directory holds, and reads the index of their fragments.

state.json               the trainer's state: step, samples, config, versions, mesh
rank-00000.safetensors   flat fp32 tensors `name|key|i`: the i-th fragment of that rank, keys as in types.Fragment
rank-00000.json          the addresses of its fragments and its random state
manifest.json            size and sha256 of all of them
manifest.sha256          sha256 of the manifest
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

from llmtrain.checkpoint.reshard import check_coverage
from llmtrain.types import Address

STATE = "state.json"


@dataclass(frozen=True)
class StoredFragment:
    """Describes one fragment in a checkpoint: the `number`-th of `rank`."""

    address: Address
    keys: tuple[str, ...]
    rank: int
    number: int

    def tensor_name(self, key: str) -> str:
        return f"{self.address.name}|{key}|{self.number}"

    def to_json(self) -> dict:
        return {"address": asdict(self.address), "keys": self.keys}


def tensor_file(path: str, rank: int) -> str:
    return os.path.join(path, f"rank-{rank:05d}.safetensors")


def index_file(path: str, rank: int) -> str:
    return os.path.join(path, f"rank-{rank:05d}.json")


def read_index(path: str, rank: int) -> tuple[list[StoredFragment], dict]:
    """Returns the fragments of one rank and its random state."""
    with open(index_file(path, rank), encoding="utf-8") as f:
        content = json.load(f)
    return [_stored_fragment(entry, rank, number) for number, entry in enumerate(content["fragments"])], content[
        "random"
    ]


def by_name(fragments: Iterable[StoredFragment]) -> dict[str, list[StoredFragment]]:
    """Returns the pieces of every parameter, in the order of their appearance.

    Raises ValueError unless they cover it exactly once and hold the same keys.
    """
    parameters: dict[str, list[StoredFragment]] = defaultdict(list)
    for stored in fragments:
        parameters[stored.address.name].append(stored)
    for name, pieces in parameters.items():
        check_coverage([stored.address for stored in pieces])
        if len({stored.keys for stored in pieces}) > 1:
            raise ValueError(f"{name}: pieces with different keys, {sorted({stored.keys for stored in pieces})}")
    return dict(parameters)


def check_complete(parameters: Mapping[str, list[StoredFragment]], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError unless the parameters are those of the model, with their global shapes."""
    held = {name: pieces[0].address.shape for name, pieces in parameters.items()}
    for name in sorted(held.keys() | shapes.keys()):
        if held.get(name) != shapes.get(name):
            found = f"has shape {list(held[name])}" if name in held else "is reported by no rank"
            wanted = f"has shape {list(shapes[name])} in" if name in shapes else "is unknown to"
            raise ValueError(f"{name}: {found} and {wanted} the model; a checkpoint holds exactly the model")


def _stored_fragment(entry: dict, rank: int, number: int) -> StoredFragment:
    address = Address(**{**entry["address"], "shape": tuple(entry["address"]["shape"])})
    return StoredFragment(address, tuple(entry["keys"]), rank, number)
