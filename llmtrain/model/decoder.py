"""The decoder: one plain model file, no distributed code. Every part may be missing, for pipeline stages."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from importlib import import_module

import torch
from torch import Tensor, nn

from llmtrain.arch.adapters import adapter_shapes
from llmtrain.arch.families import family_of
from llmtrain.arch.mup import base_of, logit_factor, std_factor
from llmtrain.arch.parameters import has_experts, layer_type
from llmtrain.config.schema import ModelConfig
from llmtrain.model.attention import Attention, LayerCache, View, attention_mask
from llmtrain.model.feedforward import FeedForward
from llmtrain.model.heads import LMHead, ScalarHead
from llmtrain.model.lora import add_adapters, initial_adapter
from llmtrain.model.mla import LatentAttention
from llmtrain.model.moe import MoE
from llmtrain.model.mtp import MultiToken, Rows
from llmtrain.model.norm import hidden_norm
from llmtrain.model.rope import rope_angles, rope_frequencies, rope_magnitude


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


def make_head(config: ModelConfig) -> LMHead | ScalarHead:
    """Returns the head that `model.head` names. Softcap and muP's factor are those of logits."""
    if config.head == "scalar":
        return ScalarHead(config.hidden_size)
    return LMHead(config.hidden_size, config.vocab_size, config.logit_softcap, logit_factor(config))


def _embedding(rows: int, hidden_size: int) -> nn.Embedding:
    """Uninitialised. torch's own way would draw numbers; on the meta device it would import the compiler for that."""
    return nn.Embedding.from_pretrained(torch.empty(rows, hidden_size), freeze=False)


class Decoder(nn.Module):
    """embed -> layers -> norm -> head, each optional. Parameters are uninitialised: see `init_tensor`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = _embedding(config.vocab_size, config.hidden_size)
        learned = config.positions == "learned"
        self.position_embed = _embedding(config.max_positions, config.hidden_size) if learned else None
        self.layers = nn.ModuleDict({str(i): Block(config, i) for i in range(config.num_layers)})
        self.norm = hidden_norm(config)
        self.head = make_head(config)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        further = [Block(config, config.num_layers + depth) for depth in range(config.mtp_layers)]
        self.mtp = MultiToken(config, further) if further else None
        if config.lora is not None:
            add_adapters(self, config.lora)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        segment_ids: Tensor | None = None,
        branch_ids: Tensor | None = None,
        labels: Tensor | None = None,
        temperature: Tensor | None = None,
        masks: Mapping[str, Tensor] | None = None,
        caches: Mapping[str, LayerCache] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Token ids [B, T] (or, without `embed`, hidden states) to logits, (log-probs, entropies), values of a scalar
        head, or hidden states.

        `positions` [B, T]; `segment_ids`, `branch_ids` as in `types.Batch`; `masks`, one for each kind of layer,
        override both. `caches` maps layer names to key/value caches (generation). `labels`, `temperature`: see
        `LMHead`.
        """
        ids = x
        if self.embed is not None:
            x = self.embedded(ids, positions)
        views = self.views(x.dtype, positions, segment_ids, branch_ids, masks)
        for name, block in self.layers.items():
            x = block(x, views[block.kind], caches[name] if caches else None)
        if self.norm is not None:
            x = self.norm(x)
        if self.mtp is not None and self.mtp.loss_factor and labels is not None and torch.is_grad_enabled():
            rows = Rows(ids, labels, segment_ids)
            x = self.mtp.attached(x, rows, views, lambda further: self.embedded(further, positions), self.head)
        return x if self.head is None else self.head(x, labels, temperature)

    def blocks(self) -> list[Block]:
        """Those of the layers that are here, and of the modules for the tokens after the next."""
        return [*self.layers.values(), *(depth.block for depth in (self.mtp or {}).values())]

    def embedded(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Token ids [B, T] to hidden states."""
        x = self.embed(ids)
        if self.config.scale_embeddings:  # the factor rounded as the published models round it
            x = x * torch.tensor(self.config.hidden_size**0.5, dtype=x.dtype)
        return x if self.position_embed is None else x + self.position_embed(positions)

    def views(
        self,
        dtype: torch.dtype,
        positions: Tensor,
        segment_ids: Tensor | None,
        branch_ids: Tensor | None,
        masks: Mapping[str, Tensor] | None,
    ) -> dict[str, View]:
        """For each kind of layer here."""
        padding = None if segment_ids is None or self.config.moe is None else segment_ids < 0
        found = {}
        for kind in dict.fromkeys(block.kind for block in self.layers.values()):
            window = self.config.sliding_window if kind == "sliding" else None
            mask = masks[kind] if masks else self.visibility(segment_ids, branch_ids, positions, window)
            found[kind] = View(*self.angles(positions, dtype, kind), mask, padding)
        return found

    def visibility(
        self, segment_ids: Tensor | None, branch_ids: Tensor | None, positions: Tensor, window: int | None
    ) -> Tensor | None:
        """What `Attention.attend` takes as its mask; None = causal."""
        if segment_ids is None and (window is None or window >= positions.size(1)):
            return None
        segments = torch.zeros_like(positions) if segment_ids is None else segment_ids
        return attention_mask(segments, branch_ids, positions=positions, window=window)

    def angles(self, positions: Tensor, dtype: torch.dtype, kind: str) -> tuple[Tensor | None, Tensor | None]:
        """RoPE's cos and sin. Computed anew: a buffer would be rounded when an engine casts the module to bf16."""
        c = self.config
        if c.positions == "learned":
            return None, None
        head_dim = c.mla.rope_head_dim if c.mla else c.head_dim or c.hidden_size // c.num_heads
        theta, scaling = c.rope_theta, c.rope_scaling
        if kind == "sliding" and c.rope_theta_sliding is not None:
            theta, scaling = c.rope_theta_sliding, None
        freqs = rope_frequencies(head_dim, theta, scaling, positions.device)
        return rope_angles(positions, freqs, dtype, rope_magnitude(scaling))


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical names and global shapes, in module order; a router's bias is there, a tied head is not."""
    with torch.device("meta"):
        state = Decoder(config).state_dict()
    return {name: tuple(p.shape) for name, p in state.items() if not (config.tie_embeddings and name == "head.weight")}


def trained_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """What a checkpoint holds: of a model with adapters these alone, else `parameter_shapes`."""
    return parameter_shapes(config) if config.lora is None else adapter_shapes(config)


RESIDUAL = ("attention.o.weight", "feedforward.down.weight", "experts.down", "shared.down.weight")
"""What writes to the residual stream."""


def init_tensor(name: str, shape: tuple[int, ...], config: ModelConfig, seed: int) -> Tensor:
    """The initial value of one parameter, fp32. A pure function of name and seed, so every layout starts equal.

    Norms are 1 (0 where the factor is 1 + weight), biases 0; matrices as the family says, else N(0, 0.02), and those
    that write to the residual stream smaller by sqrt(2 layers) (GPT-2).
    """
    if name.endswith(".bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.zeros(shape) if config.norm_offset else torch.ones(shape)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    if name.endswith((".lora.a", ".lora.b")):
        return initial_adapter(name[-1], shape, generator)
    return torch.randn(shape, generator=generator) * init_std(name, shape, config)


def init_std(name: str, shape: tuple[int, ...], config: ModelConfig) -> float:
    """Standard deviation of a matrix, by the family or as usual; with `config.mup` that of the base width, times muP's
    factor."""
    if name == "head.weight" and config.head == "scalar":
        # As in OpenRLHF. Values start near 0, with a deviation of about hidden_size^-0.5, so that a critic's first
        # errors are the returns; and unlike with zeros the body has a gradient in the first step.
        return 1 / (config.hidden_size + 1)
    own = family_of(config.family).init
    std = own(name, *base_of(name, shape, config)) if own else None
    if std is None:
        std = 0.02 / math.sqrt(2 * config.num_layers) if name.endswith(RESIDUAL) else 0.02
    return std * std_factor(name, shape, config)


@torch.no_grad()
def initialize(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill a whole (unsharded) decoder with its initial values."""
    for name, p in (*model.named_parameters(), *model.named_buffers()):
        p.copy_(init_tensor(name, tuple(p.shape), config, seed))
