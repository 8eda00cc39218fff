"""Provides weights by canonical name from a checkpoint, a run or a Hugging Face directory."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch

from llmtrain.arch.adapters import without_adapters
from llmtrain.arch.resolve import resolve_model
from llmtrain.checkpoint.group import CheckpointGroup
from llmtrain.checkpoint.load import CheckpointReader
from llmtrain.checkpoint.manifest import MANIFEST, MANIFEST_SUM, newest_intact, verify
from llmtrain.config.schema import ModelConfig
from llmtrain.model.decoder import Decoder, trained_shapes
from llmtrain.model.hf import hf_weight_source
from llmtrain.model.hf_files import weight_files
from llmtrain.model.lora import merged
from llmtrain.types import WeightSource

SAMPLES, SAMPLE_BYTES = 64, 4096  # read from each file that no manifest holds a checksum of


def weight_source(path: str, config: ModelConfig, group: CheckpointGroup | None = None) -> WeightSource:
    """Returns a source of the weights that `locate` finds at the path.

    Adapters that a run has trained are merged; adapters of `config` are ignored. A tied model has no `head.weight` of
    its own. Raises ValueError as `locate` does, and when the parameters are not those of `config`.
    """
    return source_at(locate(path, group), config, group)


def locate(path: str, group: CheckpointGroup | None = None) -> str:
    """Returns the checkpoint or Hugging Face directory that a path means: for a run directory its newest intact
    checkpoint.

    With a `group` this is a collective, and every rank hashes its share of the files. Raises ValueError when there is
    none, or a file of it is broken.
    """
    checkpoints = os.path.join(path, "checkpoints")
    if os.path.isfile(os.path.join(path, MANIFEST)):
        verify(path, group)
        return path
    if os.path.isdir(checkpoints):
        newest = newest_intact(checkpoints, group)
        if newest is None:
            raise ValueError(f"{checkpoints}: no intact checkpoint in it; the run must save one first")
        return newest
    if os.path.isfile(os.path.join(path, "config.json")):
        return path
    raise ValueError(
        f"{path}: no weights here; looked for checkpoints/ (a run directory), {MANIFEST} (a checkpoint) and "
        "config.json (a Hugging Face directory)"
    )


def source_at(place: str, config: ModelConfig, group: CheckpointGroup | None = None) -> WeightSource:
    """Returns the source of a place that `locate` found, see `weight_source`. A collective only where adapters are
    merged."""
    config = without_adapters(config)
    if not os.path.isfile(os.path.join(place, MANIFEST)):
        stored = hf_weight_source(place, config)
        return lambda name: stored(name).float()
    reader = CheckpointReader(place)
    saved = reader.state.get("model", {})
    trained = ModelConfig.model_validate(saved) if saved.get("lora") else config
    _check_checkpoint(reader, trained, config)
    return reader.full if trained.lora is None else _merging(reader, trained, config, group)


def fingerprint(place: str) -> str:
    """Returns a hash of the weights in a checkpoint or Hugging Face directory, so that a replacement is noticed.

    It covers all bytes of a checkpoint, and headers, sizes and samples of other safetensors files.
    """
    manifest = os.path.join(place, MANIFEST_SUM)
    if os.path.isfile(manifest):
        with open(manifest, "rb") as f:
            return f.read().decode().split()[0]
    digest = hashlib.sha256()
    for name in sorted({name for name in os.listdir(place) if name.endswith(".safetensors")} | weight_names(place)):
        size = os.path.getsize(os.path.join(place, name))
        digest.update(f"{name} {size}".encode())
        with open(os.path.join(place, name), "rb") as f:
            for i in range(SAMPLES):
                f.seek(size * i // SAMPLES)
                digest.update(f.read(SAMPLE_BYTES))
    return digest.hexdigest()


def weight_names(place: str) -> set[str]:
    """Returns the names of the files that hold the weights of a Hugging Face directory, which may lie below it."""
    return {str(path.relative_to(place)) for path in weight_files(Path(place))}


def load_decoder(path: str, config: ModelConfig, dtype: torch.dtype) -> Decoder:
    """Returns the whole model in one process, for evaluation and generation. Raises as `weight_source` does."""
    config = without_adapters(config)
    weight = weight_source(path, config)
    model = Decoder(config).to(dtype)
    with torch.no_grad():
        for name, held in (*model.named_parameters(), *model.named_buffers()):
            held.copy_(weight(name))
    return model


def _check_checkpoint(reader: CheckpointReader, trained: ModelConfig, config: ModelConfig) -> None:
    """Raises ValueError unless the checkpoint holds what a run of `trained` saves, and that is the model `config`."""
    path, shapes = reader.path, trained_shapes(trained)
    for name, shape in shapes.items():
        reader.check_shape(name, shape)
    left_out = {name for name in reader.names() if name.startswith("mtp.")}  # `model.mtp_layers` may be lower now
    if unknown := sorted(set(reader.names()) - set(shapes) - left_out):
        raise ValueError(
            f"{path}: the model of this config has no {unknown[0]} ({len(unknown)} such); "
            "the model section must be the one it was trained with"
        )
    saved, now = reader.state.get("model", {}), config.model_dump(mode="json")
    for key in ("rope_theta", "rope_scaling"):  # may change within a run that has a ramp
        if saved.get(key, now[key]) != now[key]:
            raise ValueError(
                f"model.{key}={now[key]}: {path} was trained with {saved[key]}; give that, or a newer checkpoint"
            )


def _merging(
    reader: CheckpointReader, trained: ModelConfig, config: ModelConfig, group: CheckpointGroup | None
) -> WeightSource:
    """Returns a source of the base weights with the run's adapters merged into them."""
    base = trained.init_from
    if base is None or not os.path.isdir(base):
        raise ValueError(
            f"{reader.path}: holds only adapters, and {base}, which they were trained on, is not there; put it back"
        )
    place = locate(base, group)
    if fingerprint(place) != reader.state["base"]:
        raise ValueError(
            f"{reader.path}: holds only adapters, and {place} is not what they were trained on: its weights have "
            "changed; put those of that time back"
        )
    rope = resolve_model(ModelConfig(init_from=base))  # a ramp may have changed RoPE since
    of_base = config.model_copy(update={"rope_theta": rope.rope_theta, "rope_scaling": rope.rope_scaling})
    weights, adapters = source_at(place, of_base, group), set(reader.names())
    return lambda name: merged(name, trained, lambda part: (reader.full if part in adapters else weights)(part))
