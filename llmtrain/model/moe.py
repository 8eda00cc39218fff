"""Defines the mixture of experts, a feed-forward layer (arXiv 2101.03961, 2401.06066). No token is ever dropped.

Tokens are sorted by expert once, the experts' products run on the sorted rows, and the outputs of a token's experts are
summed: x' = sum_k w_k E_k(x) + shared(x).
"""

from __future__ import annotations

from torch import Tensor, nn

from llmtrain.config.schema import ModelConfig
from llmtrain.model.experts import Experts
from llmtrain.model.feedforward import FeedForward
from llmtrain.model.kernels.permute import Collect, Spread, sort_by_expert
from llmtrain.model.router import Router


class MoE(nn.Module):
    """Holds a router, the experts it chooses from, and the shared expert that every token takes, if there is one."""

    routes = True  # a block calls it with the padding too

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.moe is not None
        self.router = Router(config)
        self.experts = Experts(config)
        shared = config.moe.shared_ffn_size
        self.shared = FeedForward(config, shared) if shared else None

    def forward(self, x: Tensor, padding: Tensor | None = None, experts: Tensor | None = None) -> Tensor:
        """Returns [B, T, hidden], as x is. Where `padding` [B, T] bool is True, no routed expert is used. `experts` are
        the router's."""
        shared = None if self.shared is None else self.shared(x)
        indices, weights = self.router(x, padding, experts)
        y = self.routed(x.flatten(0, 1), indices, weights).view_as(x)
        return y if shared is None else y + shared

    def routed(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """Returns the weighted sum over the chosen experts, [N, hidden]. x [N, hidden]; indices and weights [N, k] are
        the router's. Expert parallelism replaces this method."""
        return dispatch(x, indices, weights, self.experts)


def dispatch(x: Tensor, indices: Tensor, weights: Tensor, experts: Experts) -> Tensor:
    """Returns, for each row of x [N, hidden], the sum of the outputs of its experts `indices` [N, k] times `weights`
    [N, k]. An index beyond the last expert stands for none."""
    order, places, counts = sort_by_expert(indices, experts.gate.size(0))
    rows = Spread.apply(x, order, places)
    y = experts(rows, counts, weights.flatten().index_select(0, order))
    return Collect.apply(y, order, places)
