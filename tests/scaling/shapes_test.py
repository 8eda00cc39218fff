"""Parameters as scaling laws count them, and shapes of a given number of them."""

from __future__ import annotations

import pytest

from llmtrain.config.schema import ModelConfig, MoeConfig
from llmtrain.scaling.shapes import counted, shape_of

BASE = ModelConfig(num_layers=2, hidden_size=32, ffn_size=96, num_heads=2, num_kv_heads=2, vocab_size=100)


def test_what_counts() -> None:
    blocks = 2 * (4 * 32 * 32 + 3 * 32 * 96 + 2 * 32) + 32  # attention, feed-forward, norms; the last norm
    assert counted(BASE, "all") == blocks + 100 * 32 == 29_984
    assert counted(BASE, "non_embedding") == blocks == 26_784
    untied = BASE.model_copy(update={"tie_embeddings": False})
    assert counted(untied, "all") == blocks + 2 * 3200
    assert counted(untied, "non_embedding") == blocks, "the head is an embedding of outputs"
    learned = BASE.model_copy(update={"positions": "learned", "max_positions": 10})
    assert counted(learned, "non_embedding") == blocks
    experts = BASE.model_copy(update={"moe": MoeConfig(num_experts=4, top_k=1, expert_ffn_size=96)})
    assert counted(experts, "non_embedding") == blocks + 2 * 4 * 32, "one expert of four, and the router"


def test_a_shape_has_about_the_parameters() -> None:
    for target in (3e4, 1e5, 1e6, 1e7, 1e8):
        shape = shape_of(target, BASE, 32.0, "all")
        assert counted(BASE.model_copy(update=shape), "all") == pytest.approx(target, rel=0.1)
        assert shape["hidden_size"] == 16 * shape["num_heads"] and shape["ffn_size"] % 8 == 0
        assert 16 <= shape["hidden_size"] / shape["num_layers"] <= 64
    assert shape_of(29_984, BASE, 16.0, "all") == {
        **{"num_layers": 2, "hidden_size": 32, "ffn_size": 96, "num_heads": 2, "num_kv_heads": 2}
    }


def test_heads_stay_in_their_groups() -> None:
    grouped = BASE.model_copy(update={"num_heads": 4, "num_kv_heads": 2, "hidden_size": 64})
    shape = shape_of(1e6, grouped, 32.0, "non_embedding")
    assert shape["num_heads"] == 2 * shape["num_kv_heads"]
    assert shape["ffn_size"] / shape["hidden_size"] == pytest.approx(1.5, rel=0.03), "the ratio of the base"


def test_what_has_no_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the nearest shape, .*, has 4,976 parameters; change it"):
        shape_of(1000, BASE, 32.0, "all")
    with pytest.raises(ValueError, match="gives no shape with latent attention or experts"):
        shape_of(1e6, BASE.model_copy(update={"moe": MoeConfig()}), 32.0, "all")
