"""Defines the family PaLM (arXiv 2204.02311, section 2).

It has attention and feed-forward layer in parallel, one key/value head, SwiGLU, RoPE, LayerNorm, no biases, and tied
embeddings.

The paper draws embeddings from N(0, 1) and divides logits by sqrt(hidden_size). Our embeddings are the paper's divided
by sqrt(hidden_size) and are multiplied by it when they are looked up: the same function, and the logits need no factor.
transformers has no such model.
"""

from __future__ import annotations

from typing import Any

from llmtrain.arch.families.base import Family
from llmtrain.config.schema import ModelConfig

FIELDS: dict[str, Any] = {
    "block": "parallel",
    "norm": "layer",
    "norm_eps": 1e-6,
    "num_kv_heads": 1,
    "scale_embeddings": True,
    "tie_embeddings": True,
}


def init(name: str, shape: tuple[int, ...], model: ModelConfig) -> float:
    """Returns the standard deviation of section 5, 1 / sqrt(fan-in), at any depth.

    The paper's embeddings N(0, 1), divided by sqrt(hidden_size) here, follow the same rule.
    """
    return shape[-1] ** -0.5


def _shape(layers: int, hidden: int, heads: int) -> dict[str, Any]:
    """Returns a model of table 1: heads of 256, a feed-forward layer four times as wide, vocabulary 256,000, rows of
    2,048."""
    shape = {"num_layers": layers, "hidden_size": hidden, "ffn_size": 4 * hidden, "num_heads": heads}
    return {**shape, "num_kv_heads": 1, "head_dim": 256, "vocab_size": 256000, "max_positions": 2048}


PRESETS: dict[str, dict[str, Any]] = {
    "palm-8b": _shape(32, 4096, 16),
    "palm-62b": _shape(64, 8192, 32),
    "palm-540b": _shape(118, 18432, 48),
}

FAMILY = Family(name="palm", fields=FIELDS, presets=PRESETS, init=init)
