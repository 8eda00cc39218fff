"""Folds muP's factors into weights, so that software without muP computes the same function."""

from __future__ import annotations

from torch import Tensor

from llmtrain.arch.mup import logit_factor, score_factor
from llmtrain.config.schema import ModelConfig


def folded(name: str, weight: Tensor, model: ModelConfig) -> Tensor:
    """Returns a whole parameter of `model` as one of the same model without muP.

    The factor of the logits goes into the last norm, so that a tied head needs none; the factor of the attention scores
    goes into q, or its norm if there is one.
    """
    if name in ("norm.weight", "norm.bias"):
        return _scaled(name, weight, logit_factor(model), model)
    module = name.rpartition(".")[0]
    if module.endswith("attention.q_norm" if model.qk_norm else "attention.q"):
        return _scaled(name, weight, score_factor(model), model)
    return weight


def _scaled(name: str, weight: Tensor, factor: float, model: ModelConfig) -> Tensor:
    offset = 1.0 if model.norm_offset and name.endswith("norm.weight") else 0.0  # such a norm's factor is 1 + weight
    return weight if factor == 1.0 else (weight + offset) * factor - offset
