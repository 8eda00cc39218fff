"""Defines the shapes of the model benchmark: every family at the same width and about the same size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llmtrain.arch.resolve import resolve_model
from llmtrain.config.schema import MlaConfig, ModelConfig, MoeConfig


@dataclass(frozen=True)
class Size:
    """Holds what is common to all families. The head dim is 64, or 32 where the width is no multiple of 128."""

    hidden: int
    layers: int  # in a dense family; one with experts, whose layers are larger, has half as many
    vocab: int
    positions: int
    published: bool = False  # with the number and relative size of experts of a published model; else fewer

    @property
    def heads(self) -> int:
        return self.hidden // (64 if self.hidden % 128 == 0 else 32)

    def shape(self, layers: int, **own: Any) -> dict[str, Any]:
        """Returns fields of ModelConfig, with half as many K/V heads as query heads."""
        heads = {"num_heads": self.heads, "num_kv_heads": self.heads // 2}
        size = {"num_layers": layers, "hidden_size": self.hidden, "ffn_size": 3 * self.hidden}
        return {**size, **heads, "vocab_size": self.vocab, "max_positions": self.positions, **own}

    def dense(self, **own: Any) -> dict[str, Any]:
        """Returns a shape without experts."""
        return self.shape(self.layers, **own)

    def sparse(self, experts: dict[str, Any], **own: Any) -> dict[str, Any]:
        """Returns a shape with experts, not balanced, so that no loss is added on either side."""
        moe = MoeConfig(**{"balance": "none", **experts})
        return self.shape(max(2, self.layers // 2), moe=moe, **own)

    def latent(self, q_rank: int | None, experts: dict[str, Any]) -> dict[str, Any]:
        """Returns a DeepSeek shape: the first layer dense, small experts and a shared one, latents a quarter as wide as
        h."""
        h = self.hidden
        mla = MlaConfig(q_rank=q_rank, kv_rank=h // 4, nope_head_dim=32, rope_head_dim=16, v_head_dim=32)
        return self.sparse({"dense_layers": [0], **experts}, num_kv_heads=self.heads, mla=mla)

    def experts(self, number: int, top_k: int, eighths: float, shared: int = 0) -> dict[str, Any]:
        """Returns fields of experts as wide as `eighths` of the width, the shared one `shared` times that; multiples of
        8."""
        ffn = round(eighths * self.hidden / 64) * 8
        return {"num_experts": number, "top_k": top_k, "expert_ffn_size": ffn, "shared_ffn_size": shared * ffn}

    def qwen3_moe(self) -> dict[str, Any]:
        """Returns the shape of a Qwen3-MoE; published: Qwen3-30B-A3B, experts of 768 for a width of 2,048."""
        return self.sparse(self.experts(128, 8, 3) if self.published else self.experts(16, 4, 4))

    def deepseek_v2(self) -> dict[str, Any]:
        """Returns the shape of a DeepSeek V2; published: V2-Lite, experts of 1,408 for a width of 2,048."""
        experts = self.experts(64, 6, 5.5, shared=2) if self.published else self.experts(16, 4, 4, shared=2)
        return self.latent(None, {**experts, "normalize": False})

    def deepseek_v3(self) -> dict[str, Any]:
        """Returns the shape of a DeepSeek V3; published: experts of 2,048 for a width of 7,168, 4 of 8 groups."""
        gate = {"gate": "sigmoid", "selection_bias": True}
        if self.published:
            chosen = {**self.experts(256, 8, 16 / 7, shared=1), "num_groups": 8, "top_groups": 4}
        else:
            chosen = {**self.experts(16, 4, 4, shared=2), "num_groups": 4, "top_groups": 2}
        return self.latent(3 * self.hidden // 8, {**chosen, **gate})


SHAPES: dict[str, Callable[[Size], dict[str, Any]]] = {
    "llama": lambda s: s.dense(),
    "gpt2": lambda s: s.dense(ffn_size=4 * s.hidden, num_kv_heads=s.heads),
    "qwen2": lambda s: s.dense(),
    "qwen3": lambda s: s.dense(),
    "gemma3": lambda s: s.dense(sliding_window=max(8, s.positions // 2), layer_types=["sliding"] * 5 + ["full"]),
    "mixtral": lambda s: s.sparse(s.experts(8, 2, 28 if s.published else 8)),  # published: 14,336 for a width of 4,096
    "qwen3-moe": Size.qwen3_moe,
    "deepseek-v2": Size.deepseek_v2,
    "deepseek-v3": Size.deepseek_v3,
}


def model_of(family: str, size: Size) -> ModelConfig:
    """Returns the resolved model of a family at this size."""
    return resolve_model(ModelConfig(family=family, **SHAPES[family](size)))
