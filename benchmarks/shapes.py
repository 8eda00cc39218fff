"""The shapes of the model benchmark: every family at the same width and about the same size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llmtrain.config.schema import MlaConfig, ModelConfig, MoeConfig
from llmtrain.config.shapes import resolve_model


@dataclass(frozen=True)
class Size:
    """What is common to all families. The head dim is 64, or 32 where the width is no multiple of it."""

    hidden: int
    layers: int  # of a dense family; one with experts, whose layers are larger, has half as many
    vocab: int
    positions: int

    @property
    def heads(self) -> int:
        return self.hidden // (64 if self.hidden % 128 == 0 else 32)

    def shape(self, layers: int, **own: Any) -> dict[str, Any]:
        """Fields of ModelConfig, with half as many K/V heads as query heads."""
        heads = {"num_heads": self.heads, "num_kv_heads": self.heads // 2}
        size = {"num_layers": layers, "hidden_size": self.hidden, "ffn_size": 3 * self.hidden}
        return {**size, **heads, "vocab_size": self.vocab, "max_positions": self.positions, **own}

    def dense(self, **own: Any) -> dict[str, Any]:
        """A family without experts."""
        return self.shape(self.layers, **own)

    def sparse(self, moe: dict[str, Any], **own: Any) -> dict[str, Any]:
        """A family with experts; balanced by nothing, so that no loss is added on either side."""
        return self.shape(max(2, self.layers // 2), moe=MoeConfig(balance="none", **moe), **own)

    def latent(self, q_rank: int | None, moe: dict[str, Any]) -> dict[str, Any]:
        """A DeepSeek: the first layer dense, 16 small experts and a shared one, latents a quarter as wide as h."""
        h = self.hidden
        mla = MlaConfig(q_rank=q_rank, kv_rank=h // 4, nope_head_dim=32, rope_head_dim=16, v_head_dim=32)
        experts = {"num_experts": 16, "top_k": 4, "expert_ffn_size": h // 2, "shared_ffn_size": h}
        return self.sparse({**experts, "dense_layers": [0], **moe}, num_kv_heads=self.heads, mla=mla)


SHAPES: dict[str, Callable[[Size], dict[str, Any]]] = {
    "llama": lambda s: s.dense(),
    "gpt2": lambda s: s.dense(ffn_size=4 * s.hidden, num_kv_heads=s.heads),
    "qwen2": lambda s: s.dense(),
    "qwen3": lambda s: s.dense(),
    "gemma3": lambda s: s.dense(sliding_window=max(8, s.positions // 2), layer_types=["sliding"] * 5 + ["full"]),
    "mixtral": lambda s: s.sparse({"num_experts": 8, "top_k": 2, "expert_ffn_size": s.hidden}),
    "qwen3-moe": lambda s: s.sparse({"num_experts": 16, "top_k": 4, "expert_ffn_size": s.hidden // 2}),
    "deepseek-v2": lambda s: s.latent(None, {"normalize": False}),
    "deepseek-v3": lambda s: s.latent(
        3 * s.hidden // 8, {"gate": "sigmoid", "selection_bias": True, "num_groups": 4, "top_groups": 2}
    ),
}


def model_of(family: str, size: Size) -> ModelConfig:
    """Resolved."""
    return resolve_model(ModelConfig(family=family, **SHAPES[family](size)))
