"""Defines the feed-forward layers of the experts, whose weights are stacked."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmtrain.config.schema import ModelConfig
from llmtrain.model.kernels.experts import expert_feedforward


class Experts(nn.Module):
    """Computes down(act(gate(x)) * up(x)) by E experts: gate, up [E, ffn, hidden], down [E, hidden, ffn]."""

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
        """Returns the number of experts of this rank."""
        return self.gate.size(0)

    def forward(self, x: Tensor, counts: Tensor, weights: Tensor) -> Tensor:
        """Returns the experts' outputs times `weights` [N]: [N, hidden].

        x [N, hidden] is sorted by expert: the first counts[0] rows go to expert 0, the next counts[1] to expert 1 and
        so on; rows beyond their sum give zeros. counts [E] int64. The weights are applied in front of `down`, so that
        the backward does not need the output of `down`.
        """
        return expert_feedforward(x, weights.to(x.dtype), self.gate, self.up, self.down, counts, self.activation)
