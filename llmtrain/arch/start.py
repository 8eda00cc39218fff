"""Tells what a model takes from the weights that it starts from, and what is new in it. It imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmtrain.arch.adapters import adapter_shapes
from llmtrain.config.schema import ModelConfig


def stored_model(model: ModelConfig, found: Mapping[str, Any]) -> ModelConfig:
    """Returns the model that a directory of weights holds, of which `found` are the fields: `model` may have a larger
    vocabulary, and a scalar head where a language model is stored."""
    return model.model_copy(update={name: found[name] for name in ("vocab_size", "head", "tie_embeddings")})


def with_scalar_head(model: ModelConfig) -> ModelConfig:
    """Returns a resolved model of which only the body is the same: one number a position, trained whole."""
    return model.model_copy(update={"head": "scalar", "tie_embeddings": False, "mtp_layers": 0, "lora": None})


def new_parameters(model: ModelConfig, stored: ModelConfig) -> set[str]:
    """Returns the canonical names of what `model` has and the weights of `stored` have not: adapters, and a scalar head
    on the body of a language model."""
    return {*adapter_shapes(model), *(["head.weight"] if model.head != stored.head else [])}
