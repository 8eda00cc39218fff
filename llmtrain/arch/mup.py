"""Maximal update parametrisation (arXiv 2203.03466): a learning rate tuned on a narrow model holds for a wide one.

Its table 8 for Adam, the form that allows tied embeddings, with m = hidden_size / mup.base_hidden. All inner widths
(feed-forward, heads x head_dim) are taken to grow with hidden_size; at m = 1 nothing changes.

| parameter | initial std | lr of Adam | multiplier |
|---|---|---|---|
| embeddings, head, norms, biases | as usual | lr | logits / m |
| hidden matrices | usual / sqrt(m) | lr / m | |
| router (an output of the width, as in table 3) | usual / m | lr / m | |

No torch here; `model` is resolved everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from llmtrain.config.schema import ModelConfig

OUTER = r"(position_)?embed\.weight|head\.weight"


def ratio(model: ModelConfig) -> float:
    """m, 1.0 without muP."""
    return 1.0 if model.mup is None else model.hidden_size / model.mup.base_hidden


def kind(name: str, shape: Sequence[int]) -> str:
    """outer, hidden or router: what the parameter `name` is to muP."""
    if len(shape) < 2 or re.fullmatch(OUTER, name):
        return "outer"
    return "router" if name.endswith(".router.weight") else "hidden"


def std_factor(name: str, shape: Sequence[int], model: ModelConfig) -> float:
    """Of the initial standard deviation."""
    m = ratio(model)
    return {"outer": 1.0, "hidden": m**-0.5, "router": 1 / m}[kind(name, shape)]


def lr_factor(name: str, shape: Sequence[int], model: ModelConfig) -> float:
    """Of the learning rate; weight decay is divided by it, so that lr x weight decay stays."""
    return 1.0 if kind(name, shape) == "outer" else 1 / ratio(model)


def logit_factor(model: ModelConfig) -> float:
    """Of the logits."""
    return 1 / ratio(model)


def score_factor(model: ModelConfig) -> float:
    """Of the attention scores beside 1 / sqrt(head_dim): with it they are sqrt(base_head_dim) / head_dim q k."""
    if model.mup is None or model.mup.base_head_dim is None or model.head_dim is None:
        return 1.0
    return (model.mup.base_head_dim / model.head_dim) ** 0.5


def base_of(name: str, shape: tuple[int, ...], model: ModelConfig) -> tuple[tuple[int, ...], ModelConfig]:
    """Shape and model at the base width, by which a family's `init` is asked."""
    if model.mup is None or len(shape) < 2:
        return shape, model
    m = ratio(model)
    rows = shape[-2] / m if kind(name, shape) == "hidden" else shape[-2]
    base = model.model_copy(update={"hidden_size": model.mup.base_hidden})
    return (*shape[:-2], round(rows), round(shape[-1] / m)), base


def without_mup(model: ModelConfig) -> ModelConfig:
    """The model whose weights have the factors in them, see `model.mup.folded`."""
    return model.model_copy(update={"mup": None})
