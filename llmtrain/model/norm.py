"""Defines the normalisation layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmtrain.config.schema import ModelConfig
from llmtrain.model.kernels.eager import rms_norm


class Norm(nn.Module):
    """Computes RMSNorm (arXiv 1910.07467), x / rms(x) * weight, or with `offset` times 1 + weight (Gemma); or LayerNorm
    (arXiv 1607.06450), with or without bias. Both go over the last dim."""

    bias: nn.Parameter | None

    def __init__(self, size: int, eps: float, kind: str = "rms", bias: bool = False, offset: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size)) if bias else None
        self.eps, self.kind, self.offset = eps, kind, offset

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_with(x, self.weight, self.bias)

    def apply_with(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Returns the norm of x with the given parameters."""
        if self.kind == "layer":
            return F.layer_norm(x, (x.size(-1),), weight, bias, self.eps)
        if self.offset:  # in fp32, rounded once, as published
            return rms_norm(x.float(), 1.0 + weight.float(), self.eps).to(x.dtype)
        return rms_norm(x, weight, self.eps)


def hidden_norm(config: ModelConfig) -> Norm:
    """Returns a norm of the residual stream."""
    bias = config.norm == "layer" and config.norm_bias
    return Norm(config.hidden_size, config.norm_eps, config.norm, bias, config.norm_offset)


def head_norm(config: ModelConfig) -> Norm:
    """Returns a norm of single query or key heads."""
    assert config.head_dim is not None
    return Norm(config.head_dim, config.norm_eps, offset=config.norm_offset)
