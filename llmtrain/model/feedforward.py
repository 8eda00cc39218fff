"""Feed-forward layers: SwiGLU and GeGLU (arXiv 2002.05202), and the plain one of GPT."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmtrain.config.schema import ModelConfig
from llmtrain.model.linear import Linear


def gelu_tanh(x: Tensor) -> Tensor:
    """x (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3) (arXiv 1606.08415). For a compiler on a
    CPU as x sigmoid(2 u), which is the same: an exponential takes less time there than a tanh."""
    if x.device.type != "cpu" or not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    z, factor = x.float(), math.sqrt(8 / math.pi)
    return (z * torch.sigmoid(z * (factor + 0.044715 * factor * z * z))).to(x.dtype)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
}


class FeedForward(nn.Module):
    """down(act(gate(x)) * up(x)), or without a gate down(act(up(x))). x [B, T, hidden] -> the same shape."""

    gate: Linear | None

    def __init__(self, config: ModelConfig, ffn_size: int | None = None) -> None:
        super().__init__()
        inner, bias = ffn_size or config.ffn_size, config.ffn_bias
        self.gate = Linear(config.hidden_size, inner, bias=bias) if config.gated else None
        self.up = Linear(config.hidden_size, inner, bias=bias)
        self.down = Linear(inner, config.hidden_size, bias=bias)
        self.act = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(self.act(self.up(x)))
        return self.down(self.act(self.gate(x)) * self.up(x))
