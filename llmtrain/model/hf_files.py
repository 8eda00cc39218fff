"""Finds tensors in the safetensors files of a Hugging Face directory: the files that transformers would read, and the
names that it would read them under."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmtrain.arch.families import Family
from llmtrain.model.hf_write import INDEX

SINGLE = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
HEADS = ("lm_head", "score")
EXPERTS = "layers.*.feedforward.experts"
FUSED = r"(.*\.experts)\.(gate_up_proj|down_proj)"  # all experts of a layer in one tensor, as transformers holds them


class TensorFile(NamedTuple):
    """Says where a tensor is stored: in which file, under which name, and which part of what has that name."""

    path: Path
    name: str
    expert: int | None = None  # index along dim 0
    half: int | None = None  # first or second half of the dim after it

    def shape(self) -> tuple[int, ...]:
        """Returns the shape of the tensor."""
        with opened(self.path) as file:
            shape = tuple(file.get_slice(self.name).get_shape())
        shape = shape if self.expert is None else shape[1:]
        return shape if self.half is None else (shape[0] // 2, *shape[1:])

    def dtype(self) -> str:
        """Returns the dtype as safetensors names it, such as F32."""
        with opened(self.path) as file:
            return file.get_slice(self.name).get_dtype()

    def read(self) -> Tensor:
        """Returns the tensor, in its stored dtype."""
        with opened(self.path) as file:
            if self.expert is None:
                return file.get_tensor(self.name)
            whole = file.get_slice(self.name)
            if self.half is None:
                return whole[self.expert]
            rows = whole.get_shape()[1] // 2
            return whole[self.expert, self.half * rows : (self.half + 1) * rows]


def tensor_files(directory: Path, family: Family) -> dict[str, TensorFile]:
    """Maps each tensor name, as the family spells it today, to where it is stored.

    Raises ValueError naming the file for broken, missing or contradictory ones.
    """
    files: dict[str, TensorFile] = {}
    for path in weight_files(directory):
        with opened(path) as file:
            found = list(file.keys())
        for theirs in found:
            for name, place in _places(TensorFile(path, theirs), family).items():
                if name in files:
                    raise ValueError(
                        f"{path}: {theirs} is also in {files[name].path.name}; each tensor belongs in one file"
                    )
                files[name] = place
    return files


def weight_files(directory: Path) -> list[Path]:
    """Returns the files that hold the weights: those that `transformers_weights` of config.json names, else
    model.safetensors, else those of the index.

    Raises ValueError where there are two whole sets of them, or none.
    """
    refuse_adapters(directory)
    if named := _named(directory):
        return _shards(named) if named.name.endswith(".index.json") else [named]
    single, index = directory / SINGLE, directory / INDEX
    shards = _shards(index) if index.exists() else []
    if single.exists() and shards and shards != [single] and all(path.exists() for path in shards):
        raise ValueError(
            f"{directory}: holds two sets of weights, {SINGLE} and the files of {INDEX}; remove one of them"
        )
    if single.exists() or not shards:
        _refuse_pickles(directory)
        return [single]
    return shards


def refuse_adapters(directory: Path) -> None:
    """Raises ValueError where adapters lie beside the weights: transformers would add them."""
    path = directory / "adapter_config.json"
    if path.exists():
        raise ValueError(f"{path}: adapters beside the weights are not read; merge them, or remove them from here")


def _named(directory: Path) -> Path | None:
    """Returns the file that config.json names."""
    config = directory / "config.json"
    name = json.loads(config.read_text()).get("transformers_weights") if config.exists() else None
    if name is None:
        return None
    path = directory / str(name)
    inside = path.resolve().is_relative_to(directory.resolve())
    if not inside or not path.name.endswith((".safetensors", ".safetensors.index.json")):
        raise ValueError(
            f"{config}: transformers_weights={name}: must be a .safetensors file of the directory, or the index of "
            "several; name that, or remove the key"
        )
    return path


def _refuse_pickles(directory: Path) -> None:
    found = sorted(path for pattern in PICKLES for path in directory.glob(pattern))
    if found and not (directory / SINGLE).exists():
        raise ValueError(
            f"{found[0]}: weights in this format can run code when they are read; where you trust them, load them with "
            f"transformers, whose save_pretrained writes {SINGLE}"
        )


def _shards(index: Path) -> list[Path]:
    if not index.exists():
        raise ValueError(f"{index}: no such file, config.json names it under transformers_weights")
    try:
        return [index.parent / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: not a safetensors index ({error}); copy the file again") from None


def _places(stored: TensorFile, family: Family) -> dict[str, TensorFile]:
    """Returns the names that a stored tensor is read under: one, or those of each expert in it."""
    name = _renamed(stored.name, family)
    fused = re.fullmatch(FUSED, name)
    if fused is None or f"{EXPERTS}.gate" not in family.modules:
        return {name: stored}
    experts, kind = fused.groups()
    parts = {"gate": 0, "up": 1} if kind == "gate_up_proj" else {"down": None}
    leaves = {family.modules[f"{EXPERTS}.{part}"].partition(".experts.#.")[2]: half for part, half in parts.items()}
    with opened(stored.path) as file:
        count, *rest = file.get_slice(stored.name).get_shape()
    if len(rest) != 2 or (kind == "gate_up_proj" and rest[0] % 2):
        raise ValueError(f"{stored.path}: {stored.name} has shape {[count, *rest]}, not that of the experts of a layer")
    return {
        f"{experts}.{i}.{leaf}": TensorFile(stored.path, stored.name, i, half)
        for i in range(count)
        for leaf, half in leaves.items()
    }


def _renamed(name: str, family: Family) -> str:
    """Returns the name as the family spells it. As in transformers, the prefix of the model without its head may be
    missing, or stand where it has no place."""
    for pattern, replacement in family.renamed:
        name = re.sub(rf"^{pattern}$", replacement, name)
    prefix = family.modules["embed"].partition(".")[0]
    roots = {theirs.split(".")[1] for theirs in family.modules.values() if theirs.startswith(f"{prefix}.")}
    root = name.partition(".")[0]
    if root in roots:
        return f"{prefix}.{name}"
    inner = name.removeprefix(f"{prefix}.")
    return inner if root == prefix and inner.partition(".")[0] in (prefix, *HEADS) else name


@contextmanager
def opened(path: Path) -> Iterator[safe_open]:
    """Opens a safetensors file. Raises ValueError when it is missing or broken."""
    if not path.exists():
        raise ValueError(f"{path}: no such file; a model directory holds {SINGLE}, or {INDEX} and its shards")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path}: broken or cut short ({error}); copy the file again") from None
