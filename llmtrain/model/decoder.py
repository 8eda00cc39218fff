"""Defines the decoder and its initial values. Nothing here is distributed; a pipeline stage lacks some of the parts."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from llmtrain.arch.adapters import adapter_shapes
from llmtrain.arch.families import family_of
from llmtrain.arch.mup import base_of, logit_factor, std_factor
from llmtrain.arch.parameters import has_experts
from llmtrain.config.schema import ModelConfig
from llmtrain.model.attention import LayerCache, View, attention_mask
from llmtrain.model.blocks import Block
from llmtrain.model.heads import LMHead, ScalarHead
from llmtrain.model.lora import add_adapters, initial_adapter
from llmtrain.model.mtp import MultiToken, Rows
from llmtrain.model.norm import hidden_norm
from llmtrain.model.rope import rope_angles, rope_frequencies, rope_magnitude


def make_head(config: ModelConfig) -> LMHead | ScalarHead:
    """Returns the head that `model.head` names. Softcap and muP's factor are those of logits."""
    if config.head == "scalar":
        return ScalarHead(config.hidden_size)
    return LMHead(config.hidden_size, config.vocab_size, config.logit_softcap, logit_factor(config))


def _embedding(rows: int, hidden_size: int) -> nn.Embedding:
    """Returns an uninitialised embedding. torch's own constructor draws numbers, for which it imports the compiler
    where the device is meta."""
    return nn.Embedding.from_pretrained(torch.empty(rows, hidden_size), freeze=False)


class Decoder(nn.Module):
    """Computes embed -> layers -> norm -> head, each of which may be None on a pipeline stage.

    Parameters are uninitialised: see `init_tensor`.
    """

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
        mtp_blocks = [Block(config, config.num_layers + depth) for depth in range(config.mtp_layers)]
        self.mtp = MultiToken(config, mtp_blocks) if mtp_blocks else None
        if config.lora is not None:
            add_adapters(self, config.lora)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        segment_ids: Tensor | None = None,
        ends: Tensor | None = None,
        labels: Tensor | None = None,
        temperature: Tensor | None = None,
        masks: Mapping[str, Tensor] | None = None,
        caches: Mapping[str, LayerCache] | None = None,
        candidates: Tensor | None = None,
        top_k: int = 0,
        experts: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """Returns what the head gives for x (see `model.heads`); without a head, hidden states [B, T, hidden].

        x holds token ids [B, T], or, without `embed`, hidden states; `positions` is [B, T]. `segment_ids` and
        `ends` are those of `types.Batch`; `masks`, one for each kind of layer, override both. `caches` maps layer
        names to key/value caches (generation). `experts` are those of `types.Batch`, of all layers of the model.
        """
        ids = x
        if self.embed is not None:
            x = self.embedded(ids, positions)
        views = self.views(x.dtype, positions, segment_ids, ends, masks)
        given = self.experts_of(experts)
        for name, block in self.layers.items():
            x = block(x, views[block.kind], caches[name] if caches else None, given.get(name))
        if self.norm is not None:
            x = self.norm(x)
        if self.mtp is not None and self.mtp.loss_factor and labels is not None and torch.is_grad_enabled():
            rows = Rows(ids, labels, segment_ids)
            x = self.mtp.attached(x, rows, views, lambda shifted: self.embedded(shifted, positions), self.head)
        return x if self.head is None else self.head(x, labels, temperature, candidates, top_k)

    def blocks(self) -> list[Block]:
        """Returns the blocks that are here: those of the layers, and those of multi-token prediction."""
        return [*self.layers.values(), *(depth.block for depth in (self.mtp or {}).values())]

    def experts_of(self, experts: Tensor | None) -> dict[str, Tensor]:
        """Returns, by layer, what `experts` [B, T, layers with experts x top_k] gives each: [B, T, top_k]."""
        if experts is None:
            return {}
        return dict(zip(routed_layers(self.config), experts.split(self.config.moe.top_k, -1), strict=True))

    def embedded(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Returns the hidden states [B, T, hidden] of token ids [B, T], before the first block."""
        x = self.embed(ids)
        if self.config.scale_embeddings:  # the factor rounded as the published models round it
            x = x * torch.tensor(self.config.hidden_size**0.5, dtype=x.dtype)
        return x if self.position_embed is None else x + self.position_embed(positions)

    def views(
        self,
        dtype: torch.dtype,
        positions: Tensor,
        segment_ids: Tensor | None,
        ends: Tensor | None,
        masks: Mapping[str, Tensor] | None,
    ) -> dict[str, View]:
        """Returns, for each kind of layer here, the view that its blocks get."""
        padding = None if segment_ids is None or self.config.moe is None else segment_ids < 0
        found = {}
        for kind in dict.fromkeys(block.kind for block in self.layers.values()):
            window = self.config.sliding_window if kind == "sliding" else None
            mask = masks[kind] if masks else self.visibility(segment_ids, ends, positions, window)
            found[kind] = View(*self.angles(positions, dtype, kind), mask, padding)
        return found

    def visibility(
        self, segment_ids: Tensor | None, ends: Tensor | None, positions: Tensor, window: int | None
    ) -> Tensor | None:
        """Returns the mask that `Attention.attend` takes; None = causal."""
        if segment_ids is None and (window is None or window >= positions.size(1)):
            return None
        segments = torch.zeros_like(positions) if segment_ids is None else segment_ids
        return attention_mask(segments, ends, positions=positions, window=window)

    def angles(self, positions: Tensor, dtype: torch.dtype, kind: str) -> tuple[Tensor | None, Tensor | None]:
        """Returns RoPE's cos and sin, None where positions are learned. They are computed in every forward: a buffer
        would be rounded when an engine casts the module to bf16."""
        c = self.config
        if c.positions == "learned":
            return None, None
        head_dim = c.mla.rope_head_dim if c.mla else c.head_dim or c.hidden_size // c.num_heads
        theta, scaling = c.rope_theta, c.rope_scaling
        if kind == "sliding" and c.rope_theta_sliding is not None:
            theta, scaling = c.rope_theta_sliding, None
        freqs = rope_frequencies(head_dim, theta, scaling, positions.device)
        return rope_angles(positions, freqs, dtype, rope_magnitude(scaling))


def routed_layers(config: ModelConfig) -> list[str]:
    """Returns the names of the layers with experts, in order; those of multi-token prediction are not among them."""
    return [str(layer) for layer in range(config.num_layers) if has_experts(config, layer)]


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the canonical names and global shapes, in module order; a router's bias is there, a tied head is not."""
    with torch.device("meta"):
        state = Decoder(config).state_dict()
    return {name: tuple(p.shape) for name, p in state.items() if not (config.tie_embeddings and name == "head.weight")}


def trained_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the names and shapes that a checkpoint holds: the adapters alone if there are any, else everything."""
    return parameter_shapes(config) if config.lora is None else adapter_shapes(config)


RESIDUAL = ("attention.o.weight", "feedforward.down.weight", "experts.down", "shared.down.weight")
"""Names the matrices that write to the residual stream."""


def init_tensor(name: str, shape: tuple[int, ...], config: ModelConfig, seed: int) -> Tensor:
    """Returns the initial value of one parameter, fp32, as a pure function of name and seed: all layouts start equal.

    Norms are 1 (0 where the factor is 1 + weight), biases 0. Matrices are drawn from N(0, `init_std`).
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
    """Returns the standard deviation of a matrix: the family's, else 0.02, divided by sqrt(2 layers) for `RESIDUAL`
    matrices (GPT-2). With `config.mup` it is that of the base width, times muP's factor."""
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
    """Fills a whole (unsharded) decoder with its initial values, in place."""
    for name, p in (*model.named_parameters(), *model.named_buffers()):
        p.copy_(init_tensor(name, tuple(p.shape), config, seed))
