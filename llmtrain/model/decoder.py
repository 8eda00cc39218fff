"""The decoder: one plain model file, no distributed code. Every part may be missing, for pipeline stages."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmtrain.config.schema import ModelConfig
from llmtrain.model.attention import Attention, LayerCache, attention_mask
from llmtrain.model.feedforward import FeedForward
from llmtrain.model.heads import LMHead
from llmtrain.model.rope import rope_angles, rope_frequencies


class RMSNorm(nn.Module):
    """x / rms(x) * weight (arXiv 1910.07467)."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),), self.weight, self.eps)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feedforward(norm(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config)
        self.feedforward_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.feedforward = FeedForward(config)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: LayerCache | None = None
    ) -> Tensor:
        x = x + self.attend(x, cos, sin, mask, cache)
        return x + self.feed(x)

    def attend(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: LayerCache | None = None
    ) -> Tensor:
        """The first half, without its residual."""
        return self.attention(self.attention_norm(x), cos, sin, mask, cache)

    def feed(self, x: Tensor) -> Tensor:
        """The second half, without its residual."""
        return self.feedforward(self.feedforward_norm(x))


class Decoder(nn.Module):
    """embed -> layers -> norm -> head, each optional. Parameters are uninitialised: see `init_tensor`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleDict({str(i): Block(config) for i in range(config.num_layers)})
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = LMHead(config.hidden_size, config.vocab_size)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        segment_ids: Tensor | None = None,
        branch_ids: Tensor | None = None,
        labels: Tensor | None = None,
        temperature: Tensor | None = None,
        mask: Tensor | None = None,
        caches: Mapping[str, LayerCache] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Token ids [B, T] (or, without `embed`, hidden states) to logits, (log-probs, entropies) or hidden states.

        `positions` [B, T]; `segment_ids`, `branch_ids` as in `types.Batch`; `mask` overrides both. `caches` maps
        layer names to key/value caches (generation). `labels`, `temperature`: see `LMHead`.
        """
        if self.embed is not None:
            x = self.embed(x)
        if mask is None:
            mask = self.visibility(segment_ids, branch_ids)
        cos, sin = self.angles(positions, x.dtype)
        for name, block in self.layers.items():
            x = block(x, cos, sin, mask, caches[name] if caches else None)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.head is None else self.head(x, labels, temperature)

    def visibility(self, segment_ids: Tensor | None, branch_ids: Tensor | None) -> Tensor | None:
        """What `Attention.attend` takes as its mask; None = causal."""
        return None if segment_ids is None else attention_mask(segment_ids, branch_ids)

    def angles(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """RoPE's cos and sin. Computed anew: a buffer would be rounded when an engine casts the module to bf16."""
        c = self.config
        head_dim = c.head_dim or c.hidden_size // c.num_heads
        return rope_angles(positions, rope_frequencies(head_dim, c.rope_theta, c.rope_scaling, positions.device), dtype)


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical names and global shapes, in module order; a tied head has no entry of its own."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in Decoder(config).named_parameters()}


def init_tensor(name: str, shape: tuple[int, ...], config: ModelConfig, seed: int) -> Tensor:
    """The initial value of one parameter, fp32. A pure function of name and seed, so every layout starts equal.

    Norms are 1; matrices N(0, 0.02), and those that write to the residual stream smaller by sqrt(2 layers) (GPT-2).
    """
    if len(shape) == 1:
        return torch.ones(shape)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    std = 0.02
    if name.endswith(("attention.o.weight", "feedforward.down.weight")):
        std /= math.sqrt(2 * config.num_layers)
    return torch.randn(shape, generator=generator) * std


@torch.no_grad()
def initialize(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill a whole (unsharded) decoder with its initial values."""
    for name, p in model.named_parameters():
        p.copy_(init_tensor(name, tuple(p.shape), config, seed))
