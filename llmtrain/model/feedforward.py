"""Defines the dense feed-forward layer: SwiGLU and GeGLU (arXiv 2002.05202), or without a gate as in GPT."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from llmtrain.config.schema import ModelConfig
from llmtrain.model.kernels.activations import gelu_tanh
from llmtrain.model.linear import Linear

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
}


class FeedForward(nn.Module):
    """Computes down(act(gate(x)) * up(x)), or without a gate down(act(up(x))); x [B, T, hidden] -> the same shape."""

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
