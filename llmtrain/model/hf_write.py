"""Writes Hugging Face directories, each whole or not at all (`observe.owned`)."""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmtrain.arch.families import Disk, family_of
from llmtrain.arch.generation import GENERATION, TOKENS, as_list, read_generation
from llmtrain.arch.mup import without_mup
from llmtrain.arch.resolve import hf_config
from llmtrain.config.schema import ModelConfig
from llmtrain.model.decoder import parameter_shapes
from llmtrain.model.mup import folded
from llmtrain.observe.owned import replacing

INDEX = "model.safetensors.index.json"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}  # as safetensors names them
_BITS = {4: np.int32, 2: np.int16}  # numpy has no bf16


@dataclass(frozen=True)
class Place:
    """Says where a tensor lies in the files being written."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def write(self, x: Tensor, disk: Disk) -> None:
        """Writes x in the layout of the disk: the whole tensor, or the part of it that `disk` says."""
        bits = _BITS[self.dtype.itemsize]
        stored = np.memmap(self.path, bits, "r+", self.offset, self.shape)
        target = stored.swapaxes(-1, -2) if disk.transpose else stored
        if disk.part:
            rows = target.shape[0] // disk.part[1]
            target = target[disk.part[0] * rows : (disk.part[0] + 1) * rows]
        target[...] = x.detach().to("cpu", self.dtype).contiguous().view(torch.from_numpy(stored[:0]).dtype).numpy()
        stored.flush()


def save_hf(
    directory: str,
    config: ModelConfig,
    weights: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    tokenizer_dir: str | None,
    eos_id: int | list[int] | None,
    max_shard_bytes: float = 5e9,
    pad_id: int | None = None,
    generation: Mapping[str, Any] | None = None,
    source: str | None = None,
) -> None:
    """Writes what `AutoModelForCausalLM.from_pretrained` loads, with a scalar head what
    `AutoModelForSequenceClassification.from_pretrained` does, which gives the value at the last token that is not
    `pad_id`. `weights`: (canonical name, whole tensor), each once.

    muP's factors go into the weights. Tensors are cast to `dtype` and written one at a time. `tokenizer_dir` gives the
    tokenizer; `generation` says how to generate, None: what lies beside the tokenizer does. `source` is where the
    weights come from. Raises ValueError when a weight is missing, unknown or of another shape, and as `replacing` does.
    """
    weights, config = _plain(weights, config)
    found = read_generation(tokenizer_dir) if generation is None and tokenizer_dir else generation
    described, generation = hf_config(config), _stopping(found or {}, eos_id)
    # transformers fills in values of its own for those that are not written
    tokens = {name: generation[name] for name in TOKENS if generation.get(name) is not None}
    if config.head == "scalar":  # a text may end in what pads, if that ends texts: then only single rows can be scored
        tokens["pad_token_id"] = None if pad_id in as_list(generation.get("eos_token_id")) else pad_id
    with replacing(directory, "llmtrain export", source) as target:
        _write_shards(target, _checked(weights, config), config, dtype, max_shard_bytes)
        _write_json(target / "config.json", {**described, **tokens, "dtype": str(dtype).removeprefix("torch.")})
        _write_json(target / GENERATION, generation)
        if tokenizer_dir is not None:
            _copy_tokenizer(Path(tokenizer_dir), target)


def hf_tensors(
    weights: Iterable[tuple[str, Tensor]], config: ModelConfig, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Yields what `save_hf` would write, one tensor at a time, on the CPU: (name on disk, tensor), without duplicates.

    A tensor that several parameters make up comes with the last of them. Raises ValueError as `save_hf` does.
    """
    weights, config = _plain(weights, config)
    family, parts = family_of(config.family), dict[str, dict[int, Tensor]]()
    for name, tensor in _checked(weights, config):
        disk, kept = family.where(name, config), _kept_dtype(name, dtype)
        for theirs, x in zip(disk.names, tensor if disk.stacked else [tensor], strict=True):
            x = x.detach().to("cpu", kept)
            if disk.part:
                number, count = disk.part
                found = parts.setdefault(theirs, {})
                found[number] = x
                if len(found) < count:
                    continue
                x = torch.cat([found[i] for i in range(count)])
                del parts[theirs]
            yield theirs, (x.transpose(-1, -2) if disk.transpose else x).contiguous()


def _plain(
    weights: Iterable[tuple[str, Tensor]], config: ModelConfig
) -> tuple[Iterable[tuple[str, Tensor]], ModelConfig]:
    """Returns weights and section of the same model without muP, whose factors no config.json can say."""
    return (weights, config) if config.mup is None else (_folded(weights, config), without_mup(config))


def _folded(weights: Iterable[tuple[str, Tensor]], config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    for name, weight in weights:
        yield name, folded(name, weight, config)


def _checked(weights: Iterable[tuple[str, Tensor]], config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Yields the same pairs without a tied head; raises ValueError unless they are the whole model."""
    missing = parameter_shapes(config)
    for name, tensor in weights:
        if config.tie_embeddings and name == "head.weight":
            continue
        if missing.get(name) != tuple(tensor.shape):
            raise ValueError(f"{name} {list(tensor.shape)}: expected {missing.get(name, 'no (more) tensor so named')}")
        del missing[name]
        yield name, tensor
    if missing:
        raise ValueError(f"{next(iter(missing))}: missing ({len(missing)} in all); a model is saved whole")


def _write_shards(
    directory: Path, weights: Iterable[tuple[str, Tensor]], config: ModelConfig, dtype: torch.dtype, max_bytes: float
) -> None:
    """Writes model.safetensors, or numbered shards with their index. A tensor is in memory only while it is written."""
    family = family_of(config.family)
    tensors = _shapes_and_dtypes(config, dtype)
    shards = _plan_shards(tensors, max_bytes)
    numbered = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    files = numbered if len(shards) > 1 else ["model.safetensors"]
    places: dict[str, Place] = {}
    for file, names in zip(files, shards, strict=True):
        places |= _write_header(directory / file, {name: tensors[name] for name in names})
    for name, tensor in weights:
        disk = family.where(name, config)
        for theirs, part in zip(disk.names, tensor if disk.stacked else [tensor], strict=True):
            places[theirs].write(part, disk)
        for theirs in disk.copies:
            places[theirs].write(tensor, disk)
    if len(shards) > 1:
        weight_map = {name: place.path.name for name, place in places.items()}
        total_bytes = sum(_size_bytes(*each) for each in tensors.values())
        _write_json(directory / INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})


ShapeAndDtype = tuple[tuple[int, ...], torch.dtype]


def _shapes_and_dtypes(config: ModelConfig, dtype: torch.dtype) -> dict[str, ShapeAndDtype]:
    """Maps the names on disk to shape and dtype, in our order. The bias of a router is fp32, as published."""
    family, found = family_of(config.family), {}
    for name, shape in parameter_shapes(config).items():
        disk = family.where(name, config)
        found |= dict.fromkeys((*disk.names, *disk.copies), (disk.stored_shape(shape), _kept_dtype(name, dtype)))
    return found


def _kept_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype that a parameter has on disk."""
    return torch.float32 if name.endswith("router.bias") else dtype


def _size_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _plan_shards(tensors: dict[str, ShapeAndDtype], max_bytes: float) -> list[list[str]]:
    """Returns the names in each file. Files are filled in order; a tensor larger than `max_bytes` has one to itself."""
    shards: list[list[str]] = [[]]
    held_bytes = 0
    for name, shape_and_dtype in tensors.items():
        if shards[-1] and held_bytes + _size_bytes(*shape_and_dtype) > max_bytes:
            shards.append([])
            held_bytes = 0
        shards[-1].append(name)
        held_bytes += _size_bytes(*shape_and_dtype)
    return shards


def _write_header(path: Path, tensors: dict[str, ShapeAndDtype]) -> dict[str, Place]:
    """Begins a safetensors file at its final size and returns where in it each tensor goes. (The library's own writer
    wants all tensors at once.)

    Format: header length (8 bytes, little endian), JSON header padded with spaces, values back to back.
    """
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    for name, (shape, dtype) in tensors.items():
        starts[name], end = end, end + _size_bytes(shape, dtype)
        entries[name] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": [starts[name], end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with open(path, "r+b") as f:
        f.truncate(8 + len(header) + end)
    return {name: Place(path, 8 + len(header) + start, *tensors[name]) for name, start in starts.items()}


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _stopping(found: Mapping[str, Any], eos_id: int | list[int] | None) -> dict[str, Any]:
    """Returns generation settings that stop at `eos_id`, unless those found do."""
    known, wanted = (as_list(ids) for ids in (found.get("eos_token_id"), eos_id))
    return dict(found) if set(wanted) <= set(known) else {**found, "eos_token_id": eos_id}


def _copy_tokenizer(source: Path, target: Path) -> None:
    if not (source / "tokenizer.json").exists():
        raise ValueError(f"{source}: no tokenizer.json; give a tokenizer directory")
    for name in _TOKENIZER_FILES:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name)
        elif (source / name).exists():
            shutil.copyfile(source / name, target / name)
