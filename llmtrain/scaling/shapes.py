"""Counts the parameters of scaling laws, and finds shapes of a given number of them."""

from __future__ import annotations

import math
from collections.abc import Iterator

from llmtrain.arch.parameters import numel, outer_shapes
from llmtrain.arch.resolve import active_parameter_count, resolve_model
from llmtrain.config.schema import ModelConfig

STEP = 0.02  # shapes within this share of parameters are equally near; the aspect decides
STRETCH = 2.0  # the aspect lies within this factor of the one asked for, where a whole number of layers does
OFF = 0.1  # share by which the nearest shape may miss
EDGE = 8  # ffn_size is a multiple of this


def counted(model: ModelConfig, params: str) -> int:
    """Returns N of C = 6 N D: `all` parameters that a token passes (of experts the chosen ones), a tied head once; or
    the `non_embedding` ones, without embeddings of tokens and positions and without the head."""
    m = resolve_model(model)
    total = active_parameter_count(m)
    if params == "all":
        return total
    front, behind = outer_shapes(m)
    return total - numel(front.values()) - numel(shape for name, shape in behind.items() if name == "head.weight")


def shape_of(target: float, base: ModelConfig, aspect: float, params: str) -> dict[str, int]:
    """Returns the fields of a shape with about `target` parameters: heads as wide as those of `base` and in its groups,
    its ratio of ffn_size to hidden_size, and hidden_size / num_layers near `aspect`.

    Raises ValueError, without a key, when the nearest shape misses by more than OFF, or `base` has latent attention or
    experts, whose widths do not follow.
    """
    m = resolve_model(base)
    if m.attention != "gqa" or m.moe is not None:
        raise ValueError("gives no shape with latent attention or experts; write the shape out")
    found = [(counted(m.model_copy(update=shape), params), shape) for shape in _shapes(m, target, aspect, params)]

    def distance(entry: tuple[int, dict[str, int]]) -> tuple[int, float]:
        size, shape = entry
        ratio = shape["hidden_size"] / shape["num_layers"] / aspect
        return round(abs(math.log(size / target)) / STEP), abs(math.log(ratio))

    size, shape = min(found, key=distance)
    if abs(size / target - 1) > OFF:
        raise ValueError(f"the nearest shape, {shape}, has {size:,} parameters; change it, or write the shape out")
    return shape


def _shapes(m: ModelConfig, target: float, aspect: float, params: str) -> Iterator[dict[str, int]]:
    """Yields the shapes from the narrowest to the first that is too large."""
    assert m.head_dim is not None
    group = max(1, m.num_heads // m.num_kv_heads)
    for heads in range(group, 10_000, group):
        hidden = heads * m.head_dim
        ffn = max(EDGE, round(hidden * m.ffn_size / m.hidden_size / EDGE) * EDGE)
        shape = {"hidden_size": hidden, "ffn_size": ffn, "num_heads": heads, "num_kv_heads": heads // group}
        fewest = max(1, math.ceil(hidden / aspect / STRETCH))
        for layers in range(fewest, max(fewest, math.floor(hidden / aspect * STRETCH)) + 1):
            yield {"num_layers": layers, **shape}
        least = m.model_copy(update={"num_layers": fewest, **shape})
        if counted(least, params) > target:
            return
