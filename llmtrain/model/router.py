"""Defines the router, which chooses the experts of each token and their weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmtrain.config.schema import ModelConfig
from llmtrain.model.balance import RouterCounts, counted


class Router(nn.Module):
    """Scores all experts in fp32 and chooses the best, with `selection_bias` added and within the best groups if the
    config says so."""

    bias: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.moe is not None
        self.config = config.moe
        self.weight = nn.Parameter(torch.empty(config.moe.num_experts, config.hidden_size))
        self.register_buffer("bias", torch.zeros(config.moe.num_experts) if config.moe.selection_bias else None)
        self.counts = RouterCounts(config.moe)

    def forward(self, x: Tensor, padding: Tensor | None = None, experts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns the experts of each token of x [B, T, hidden], int64 [B T, k], and their weights, fp32 [B T, k].

        Where `padding` [B, T] is True the index is num_experts, which stands for none, and the weights are 0. `experts`
        [B, T, k] are taken instead of the router's own choice where they are not -1; their weights are the router's.
        """
        logits = self.logits(x.flatten(0, 1))
        scores = logits.softmax(-1) if self.config.gate == "softmax" else logits.sigmoid()
        indices = self.choose(scores.detach())
        if experts is not None:
            given = experts.flatten(0, 1).long()
            indices = torch.where(given < 0, indices, given)
        weights = scores.gather(1, indices)
        if self.config.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        weights = weights * self.config.scale
        if padding is not None:
            nowhere = padding.reshape(-1, 1)
            indices = indices.masked_fill(nowhere, self.config.num_experts)
            weights = weights.masked_fill(nowhere, 0.0)
        if torch.is_grad_enabled():
            weights = counted(weights, logits, indices, x.size(0), self.counts)
        return indices, weights

    def logits(self, x: Tensor) -> Tensor:
        """Returns the logits of all experts, fp32 [N, E], for x [N, hidden]."""
        return F.linear(x.float(), self.weight.float())

    @torch.no_grad()
    def choose(self, scores: Tensor) -> Tensor:
        """Returns the top_k experts of each row of scores [N, E], in any order.

        With groups, they are chosen from the groups whose best score (softmax gate, arXiv 2405.04434), or whose sum of
        the two best scores (sigmoid gate, arXiv 2412.19437), is highest.
        """
        c = self.config
        choice = scores if self.bias is None else scores + self.bias
        if c.num_groups > 1:
            grouped = choice.view(choice.size(0), c.num_groups, -1)
            best = grouped.topk(1 if c.gate == "softmax" else 2, -1).values.sum(-1)
            kept = torch.zeros_like(best, dtype=torch.bool).scatter_(1, best.topk(c.top_groups, -1).indices, True)
            choice = grouped.masked_fill(~kept[..., None], float("-inf")).flatten(1)
        return choice.topk(c.top_k, -1, sorted=False).indices

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Moves and casts the module, except that the bias stays fp32: its steps are below what bf16 resolves."""
        bias = self.bias
        super()._apply(fn, recurse)
        if bias is not None and self.bias.dtype != bias.dtype:
            self.bias = bias.to(self.bias.device)
        return self
