"""Shapes of blocks."""

from __future__ import annotations

from llmtrain.arch.families import presets
from llmtrain.arch.parameters import kinds_of, layer_shapes
from llmtrain.arch.resolve import resolve_model
from llmtrain.config.schema import ModelConfig


def test_blocks_of_a_kind_are_alike() -> None:
    """Counts of parameters, states and messages look at the first of each alone."""
    two = 0
    for preset in presets():
        model = resolve_model(ModelConfig(preset=preset))
        kinds = kinds_of(model, range(model.num_layers))
        assert sorted(layer for kind in kinds for layer in kind) == list(range(model.num_layers))
        for kind in kinds:
            assert all(layer_shapes(model, layer) == layer_shapes(model, kind[0]) for layer in kind)
        two += len(kinds) == 2
    assert two > 0
    deepseek = resolve_model(ModelConfig(preset="deepseek-v3"))
    assert kinds_of(deepseek, range(2, 5)) == [[2], [3, 4]]
