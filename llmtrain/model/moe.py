"""Mixture of experts in place of the feed-forward layer (arXiv 2101.03961, 2401.06066). No token is ever dropped.

Tokens are sorted by expert once, the experts' products run on the sorted rows, and what the chosen experts of a token
give is summed: x' = sum_k w_k E_k(x) + shared(x).
"""

from __future__ import annotations

from torch import Tensor, nn

from llmtrain.config.schema import ModelConfig
from llmtrain.model.experts import Experts
from llmtrain.model.feedforward import FeedForward
from llmtrain.model.kernels.permute import Collect, Spread, sort_by_expert
from llmtrain.model.router import Router


class MoE(nn.Module):
    """A router, the experts it chooses from, and an expert that every token takes, if there is one."""

    routes = True  # called with the padding too

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.moe is not None
        self.router = Router(config)
        self.experts = Experts(config)
        shared = config.moe.shared_ffn_size
        self.shared = FeedForward(config, shared) if shared else None

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """x [B, T, hidden] -> the same shape. `padding` [B, T] bool: True = no token, goes to no routed expert."""
        shared = None if self.shared is None else self.shared(x)
        indices, weights = self.router(x, padding)
        y = self.routed(x.flatten(0, 1), indices, weights).view_as(x)
        return y if shared is None else y + shared

    def routed(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum over the chosen experts. x [N, hidden]; indices, weights [N, k] as the router gives them:
        an index that is no expert here counts as none. Parallel forms replace this method."""
        return dispatch(x, indices, weights, self.experts)


def dispatch(x: Tensor, indices: Tensor, weights: Tensor, experts: Experts) -> Tensor:
    """x [N, hidden] -> [N, hidden]: each row to the experts in `indices` [N, k] (one beyond the last: to none), what
    they give times `weights` [N, k], summed."""
    order, places, counts = sort_by_expert(indices, experts.gate.size(0))
    rows = Spread.apply(x, order, places)
    y = experts(rows, counts, weights.flatten().index_select(0, order))
    return Collect.apply(y, order, places)
