"""Adds a family from outside, as docs/models.md tells: squared ReLU in the feed-forward layer (arXiv 2109.08668)."""

from __future__ import annotations

from llmtrain.arch.families import Family, register
from llmtrain.config.schema import ModelConfig


def feedforward_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of tests/model/toy_layers.py's FeedForward."""
    return {"up.weight": (model.ffn_size, model.hidden_size), "down.weight": (model.hidden_size, model.ffn_size)}


register(
    Family(
        name="toy",
        fields={"qk_norm": True, "norm": "layer", "gated": False},
        presets={"toy-tiny": {"num_layers": 4, "hidden_size": 64, "ffn_size": 256, "num_kv_heads": 2}},
        parts="tests.model.toy_layers",
        feedforward_shapes=feedforward_shapes,
    )
)
