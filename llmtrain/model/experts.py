"""Weights of the experts and their products. On a CPU without a compiler all three are one operation,
`model.experts_cpu`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmtrain.config.schema import ModelConfig
from llmtrain.model.feedforward import ACTIVATIONS
from llmtrain.model.kernels.experts_cpu import expert_ffn
from llmtrain.model.kernels.grouped import grouped_pair, grouped_product


class Experts(nn.Module):
    """down(act(gate(x)) * up(x)) of each expert here: gate, up [E, ffn, hidden], down [E, hidden, ffn]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        e = config.moe
        assert e is not None
        wide = (e.num_experts, e.expert_ffn_size, config.hidden_size)
        self.gate = nn.Parameter(torch.empty(wide))
        self.up = nn.Parameter(torch.empty(wide))
        self.down = nn.Parameter(torch.empty(e.num_experts, config.hidden_size, e.expert_ffn_size))
        self.activation = config.activation

    @property
    def num_experts(self) -> int:
        """Here: fewer where experts are divided over ranks."""
        return self.gate.size(0)

    def forward(self, x: Tensor, counts: Tensor, weights: Tensor) -> Tensor:
        """x [N, hidden], sorted by expert, of which the first counts[0] go to expert 0, the next counts[1] to expert 1
        and so on; rows beyond their sum give zeros. counts [E] int64.

        `weights` [N] multiply the outputs. They are applied in front of `down`, so that the backward does not need
        what `down` gives.
        """
        weights = weights.to(x.dtype)
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            return expert_ffn(x, weights, self.gate, self.up, self.down, counts, self.activation)[0]
        return self.by_grouped_products(x, counts, weights)

    def by_grouped_products(self, x: Tensor, counts: Tensor, weights: Tensor) -> Tensor:
        """`forward` on a GPU, and for a compiler, which fuses what is between the products."""
        if x.device.type == "cpu" and torch.compiler.is_compiling():  # what stands side by side costs an eager CPU more
            gate, up = grouped_pair(x, self.gate, self.up, counts).chunk(2, 1)
        else:
            gate, up = grouped_product(x, self.gate, counts), grouped_product(x, self.up, counts)
        return grouped_product(ACTIVATIONS[self.activation](gate) * up * weights[:, None], self.down, counts)
