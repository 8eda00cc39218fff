"""Reads a checkpoint into any parallel layout."""

from __future__ import annotations

import json
import os
from copy import copy
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from llmtrain.checkpoint.files import FlatFile
from llmtrain.checkpoint.layout import STATE, StoredFragment, by_name, read_index, tensor_file
from llmtrain.checkpoint.manifest import read_manifest
from llmtrain.checkpoint.reshard import assemble, check_inside, overlap, piece, slice_index, slice_numel, slicing
from llmtrain.checkpoint.rng import set_random_state
from llmtrain.types import Address


class CheckpointReader:
    """Reads the parameters of one checkpoint directory, whatever layout wrote them.

    Of a checkpoint that holds several models (see checkpoint.roles) it reads one, at first the main one. It does not
    verify checksums: take the path from `newest_intact`, or call `verify` first. It is not a collective.
    """

    def __init__(self, path: str) -> None:
        """Reads the index only. Raises ValueError when the pieces do not make whole parameters."""
        self.path, self.prefix = path, ""  # the names of this model's parameters begin with it
        with open(os.path.join(path, STATE), encoding="utf-8") as f:
            self.state: dict = json.load(f)
        # Counted in the manifest, not in the directory: only the manifest's files have been verified.
        self.num_ranks = sum(name.endswith(".safetensors") for name in read_manifest(path))
        self._parameters = by_name(stored for rank in range(self.num_ranks) for stored in read_index(path, rank)[0])
        self._cached_name, self._cached = "", dict[str, Tensor]()
        self._file = lru_cache(maxsize=None)(lambda rank: FlatFile(tensor_file(path, rank)))

    def part(self, prefix: str, state: dict) -> CheckpointReader:
        """Returns a reader of the model whose names begin with `prefix`; its `state` covers that of the whole."""
        other = copy(self)
        other.prefix, other.state = prefix, {**self.state, **state}
        other._cached_name, other._cached = "", {}
        return other

    def names(self) -> list[str]:
        """Returns the canonical names of all parameters of the model."""
        own = (name for name in self._parameters if name[: name.rfind("/") + 1] == self.prefix)
        return [name.removeprefix(self.prefix) for name in own]

    def keys(self, name: str) -> tuple[str, ...]:
        """Returns what the checkpoint holds of a parameter: `weight`, and what its optimizer kept."""
        return tuple(self._pieces(name)[0].keys)

    def check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises ValueError unless the checkpoint holds this parameter with this global shape."""
        saved = self._pieces(name)[0].address.shape
        if saved != shape:
            raise ValueError(
                f"{self.path}: {name} has shape {list(saved)}, the model has {list(shape)}; "
                "the model section must be the one it was trained with"
            )

    def full(self, name: str, key: str = "weight") -> Tensor:
        """Returns the global fp32 tensor; the last parameter stays cached, so do not write into it.

        Raises ValueError when the checkpoint does not hold it.
        """
        stored = self._pieces(name)[0]
        if key not in stored.keys:
            raise ValueError(f"{self.path}: {name} has no {key}, only {', '.join(stored.keys)}")
        if name != self._cached_name:
            self._cached_name, self._cached = name, {}
        if key not in self._cached:
            self._cached[key] = self._assemble(stored.address, key)
        return self._cached[key]

    def read(self, address: Address) -> dict[str, Tensor]:
        """Returns all keys of one piece, flat, in the caller's layout (a `FragmentReader`).

        Raises ValueError when the checkpoint does not hold the parameter, or in another shape, and when the address
        lies outside it.
        """
        self.check_shape(address.name, address.shape)
        check_inside(address)
        stored = self._pieces(address.name)[0]
        if slicing(stored.address) == slicing(address):  # same slices: read only the requested bytes
            return {key: self._span(replace(address, name=self.prefix + address.name), key) for key in stored.keys}
        return {key: piece(self.full(address.name, key), address) for key in stored.keys}

    def restore_rng(self, rank: int) -> bool:
        """Restores the random state that `rank` had in the run; returns False if the run had fewer ranks."""
        if rank >= self.num_ranks:
            return False
        set_random_state(read_index(self.path, rank)[1])
        return True

    def _pieces(self, name: str) -> list[StoredFragment]:
        if self.prefix + name not in self._parameters:
            raise ValueError(f"{self.path}: no parameter {self.prefix}{name}; it holds {', '.join(self._parameters)}")
        return self._parameters[self.prefix + name]

    def _assemble(self, saved: Address, key: str) -> Tensor:
        cut, numel = slicing(saved), slice_numel(saved)
        whole = [Address(saved.name, saved.shape, cut[0], index, cut[1], 0, numel) for index in range(cut[1])]
        return assemble(saved.shape, cut, (self._span(address, key) for address in whole))

    def _span(self, address: Address, key: str) -> Tensor:
        """Returns a piece whose slices are those of the checkpoint, joined from the stored pieces that overlap it."""
        out = torch.empty(address.numel, dtype=torch.float32)
        for stored in self._parameters[address.name]:
            begin, end = overlap(stored.address, address.start, address.numel)
            if slice_index(stored.address) == slice_index(address) and begin < end:
                wanted = out[begin - address.start : end - address.start]
                self._file(stored.rank).read(stored.tensor_name(key), begin - stored.address.start, wanted)
        return out
