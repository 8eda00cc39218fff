"""Defines the torch layer of tests/model/toy_family.py."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from llmtrain.config.schema import ModelConfig
from llmtrain.model.linear import Linear


class FeedForward(nn.Module):
    """Computes down(relu(up(x))^2). The names say how tensor parallelism cuts the matrices."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = Linear(config.hidden_size, config.ffn_size, bias=False)
        self.down = Linear(config.ffn_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)).square())
