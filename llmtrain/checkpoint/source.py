"""Weights by canonical name, from whatever holds them."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

from llmtrain.checkpoint.group import CheckpointGroup
from llmtrain.checkpoint.load import CheckpointReader
from llmtrain.checkpoint.manifest import MANIFEST, newest_intact, verify
from llmtrain.config.schema import ModelConfig
from llmtrain.model.decoder import Decoder, parameter_shapes
from llmtrain.model.hf import hf_weight_source


def weight_source(path: str, config: ModelConfig, group: CheckpointGroup | None = None) -> Callable[[str], Tensor]:
    """Canonical name -> global fp32 tensor, from a run directory (its newest intact checkpoint), a checkpoint
    directory, or a Hugging Face directory. A tied model has no `head.weight` of its own.

    With a `group` this call is a collective, and every rank hashes its share of the files; the reading is not.
    Raises ValueError when the path is none of these, a file is broken, or the parameters are not those of `config`.
    """
    checkpoints = os.path.join(path, "checkpoints")
    if os.path.isfile(os.path.join(path, MANIFEST)):
        verify(path, group)
        return _checkpoint_source(path, config)
    if os.path.isdir(checkpoints):
        newest = newest_intact(checkpoints, group)
        if newest is None:
            raise ValueError(f"{checkpoints}: no intact checkpoint in it; the run must save one first")
        return _checkpoint_source(newest, config)
    if os.path.isfile(os.path.join(path, "config.json")):
        stored = hf_weight_source(path, config)
        return lambda name: stored(name).float()
    raise ValueError(
        f"{path}: no weights here; looked for checkpoints/ (a run directory), {MANIFEST} (a checkpoint) and "
        "config.json (a Hugging Face directory)"
    )


def load_decoder(path: str, config: ModelConfig, dtype: torch.dtype) -> Decoder:
    """The whole model in one process, for evaluation and generation. Raises as `weight_source`."""
    weight = weight_source(path, config)
    model = Decoder(config).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weight(name))
    return model


def _checkpoint_source(path: str, config: ModelConfig) -> Callable[[str], Tensor]:
    reader, shapes = CheckpointReader(path), parameter_shapes(config)
    for name, shape in shapes.items():
        reader.check_shape(name, shape)
    if unknown := sorted(set(reader.names()) - set(shapes)):
        raise ValueError(
            f"{path}: the model of this config has no {unknown[0]} ({len(unknown)} such); "
            "the model section must be the one it was trained with"
        )
    trained, now = reader.state.get("model", {}), config.model_dump(mode="json")
    for key in ("rope_theta", "rope_scaling"):  # changes within a run that has a ramp
        if trained.get(key, now[key]) != now[key]:
            raise ValueError(
                f"model.{key}={now[key]}: {path} was trained with {trained[key]}; give that, or a newer checkpoint"
            )
    return reader.full
