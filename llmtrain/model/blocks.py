"""Defines the transformer block: an attention and a feed-forward layer, each added to the residual stream."""

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
    """Computes x + attention(norm(x)), then x + feedforward(norm(x)), x [B, T, hidden].

    `config.block`: `parallel` takes both of the same norm(x) and adds them at once (arXiv 2204.02311); `sandwich` has
    another norm behind each half (Gemma).
    """

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

    def forward(self, x: Tensor, view: View, cache: LayerCache | None = None, experts: Tensor | None = None) -> Tensor:
        # `routes` is read here so that a compiler guards on it: the graph of a block with experts, which may break
        # where their exchange over ranks begins, must never serve a block without. Else rematerialisation could run
        # another graph than the forward did.
        padding = view.padding if self.routes else None
        if self.feedforward_norm is None:
            return x + self.attend(x, view, cache) + self.feed(x, padding, experts)
        x = x + self.attend(x, view, cache)
        return x + self.feed(x, padding, experts)

    def attend(self, x: Tensor, view: View, cache: LayerCache | None = None) -> Tensor:
        """Returns what attention adds to the residual stream."""
        y = self.attention(self.attention_norm(x), view, cache)
        return y if self.attention_post_norm is None else self.attention_post_norm(y)

    def feed(self, x: Tensor, padding: Tensor | None, experts: Tensor | None = None) -> Tensor:
        """Returns what the feed-forward layer adds to the residual stream; `padding` [B, T] and `experts` [B, T, k]
        (see `Router.forward`) only where it `routes`."""
        y = (self.feedforward_norm or self.attention_norm)(x)
        asked = () if not self.routes else (padding,) if experts is None else (padding, experts)
        y = self.feedforward(y, *asked)
        return y if self.feedforward_post_norm is None else self.feedforward_post_norm(y)


def make_attention(config: ModelConfig) -> nn.Module:
    """Returns the attention layer, which is called with (x, View, LayerCache or None)."""
    return LatentAttention(config) if config.attention == "mla" else Attention(config)


def make_feedforward(config: ModelConfig, layer: int) -> nn.Module:
    """Returns the feed-forward layer, which is called with x, and, if it `routes`, with the padding too."""
    family = family_of(config.family)
    if family.parts:
        return import_module(family.parts).FeedForward(config)
    return MoE(config) if has_experts(config, layer) else FeedForward(config)
