"""The transformer block: an attention and a feed-forward layer, each added to the residual stream."""

from __future__ import annotations

from importlib import import_module

from torch import Tensor, nn

from llmtrain.arch.families import family_of
from llmtrain.arch.parameters import has_experts, layer_type
from llmtrain.config.schema import ModelConfig
from llmtrain.model.attention import Attention, LayerCache, View
from llmtrain.model.feedforward import FeedForward
from llmtrain.model.mla import LatentAttention
from llmtrain.model.moe import MoE
from llmtrain.model.norm import hidden_norm


class Block(nn.Module):
    """x + attention(norm(x)), then x + feedforward(norm(x)); `parallel`: both of the same norm(x), added at once
    (arXiv 2204.02311); `sandwich`: another norm behind each half (Gemma)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.kind = layer_type(config, layer)
        self.attention_norm = hidden_norm(config)
        self.attention_post_norm = hidden_norm(config) if config.block == "sandwich" else None
        self.attention = make_attention(config)
        self.feedforward_norm = None if config.block == "parallel" else hidden_norm(config)
        self.feedforward_post_norm = hidden_norm(config) if config.block == "sandwich" else None
        self.feedforward = make_feedforward(config, layer)
        self.routes = getattr(self.feedforward, "routes", False)

    def forward(self, x: Tensor, view: View, cache: LayerCache | None = None) -> Tensor:
        # Looked at here, so that a compiler's graph of a block with experts, which may end where their exchange over
        # ranks begins, never serves one without: what is computed again would be by another graph than the first time.
        padding = view.padding if self.routes else None
        if self.feedforward_norm is None:
            return x + self.attend(x, view, cache) + self.feed(x, padding)
        x = x + self.attend(x, view, cache)
        return x + self.feed(x, padding)

    def attend(self, x: Tensor, view: View, cache: LayerCache | None = None) -> Tensor:
        """The first half, without its residual."""
        y = self.attention(self.attention_norm(x), view, cache)
        return y if self.attention_post_norm is None else self.attention_post_norm(y)

    def feed(self, x: Tensor, padding: Tensor | None) -> Tensor:
        """The second half, without its residual."""
        y = (self.feedforward_norm or self.attention_norm)(x)
        y = self.feedforward(y, padding) if self.routes else self.feedforward(y)
        return y if self.feedforward_post_norm is None else self.feedforward_post_norm(y)


def make_attention(config: ModelConfig) -> nn.Module:
    """Called with (x, View, LayerCache or None)."""
    return LatentAttention(config) if config.attention == "mla" else Attention(config)


def make_feedforward(config: ModelConfig, layer: int) -> nn.Module:
    """Called with x, a mixture of experts (`routes`) with the padding too."""
    family = family_of(config.family)
    if family.parts:
        return import_module(family.parts).FeedForward(config)
    return MoE(config) if has_experts(config, layer) else FeedForward(config)
