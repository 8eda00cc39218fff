"""Implements maximal update parametrisation: a learning rate tuned on a narrow model also fits a wide one.

The rules are those of table 8 in arXiv 2203.03466 for Adam, the form that allows tied embeddings, with m = hidden_size
/ mup.base_hidden. All inner widths (feed-forward, heads x head_dim) are taken to grow with hidden_size; at m = 1
nothing changes.

| parameter | initial std | lr of Adam | multiplier |
|---|---|---|---|
| embeddings, head, norms, biases | as usual | lr | logits / m |
| hidden matrices | usual / sqrt(m) | lr / m | |
| router (its output size is fixed, as in table 3) | usual / m | lr / m | |

No torch here; `model` is a resolved ModelConfig everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from llmtrain.config.schema import ModelConfig

OUTER = r"(position_)?embed\.weight|head\.weight"


def ratio(model: ModelConfig) -> float:
    """Returns the width ratio m = hidden_size / mup.base_hidden, 1.0 without muP."""
    return 1.0 if model.mup is None else model.hidden_size / model.mup.base_hidden


def kind(name: str, shape: Sequence[int]) -> str:
    """Returns the muP class of the parameter `name`: outer, hidden or router, the rows of the table above."""
    if len(shape) < 2 or re.fullmatch(OUTER, name):
        return "outer"
    return "router" if name.endswith(".router.weight") else "hidden"


def std_factor(name: str, shape: Sequence[int], model: ModelConfig) -> float:
    """Returns the factor on the usual initial standard deviation."""
    m = ratio(model)
    return {"outer": 1.0, "hidden": m**-0.5, "router": 1 / m}[kind(name, shape)]


def lr_factor(name: str, shape: Sequence[int], model: ModelConfig) -> float:
    """Returns the factor on the learning rate. Weight decay is divided by it, so that lr x weight decay stays the
    same."""
    return 1.0 if kind(name, shape) == "outer" else 1 / ratio(model)


def logit_factor(model: ModelConfig) -> float:
    """Returns the factor on the logits."""
    return 1 / ratio(model)


def score_factor(model: ModelConfig) -> float:
    """Returns the factor on the attention scores q k / sqrt(head_dim); they become sqrt(base_head_dim) / head_dim q
    k."""
    if model.mup is None or model.mup.base_head_dim is None or model.head_dim is None:
        return 1.0
    return (model.mup.base_head_dim / model.head_dim) ** 0.5


def base_of(name: str, shape: tuple[int, ...], model: ModelConfig) -> tuple[tuple[int, ...], ModelConfig]:
    """Returns the parameter's shape and the model at the base width. A family's `init`, which may depend on the width,
    is called with these, so that the muP factors apply to the standard deviation at the base width."""
    if model.mup is None or len(shape) < 2:
        return shape, model
    m = ratio(model)
    rows = shape[-2] / m if kind(name, shape) == "hidden" else shape[-2]
    base = model.model_copy(update={"hidden_size": model.mup.base_hidden})
    return (*shape[:-2], round(rows), round(shape[-1] / m)), base


def without_mup(model: ModelConfig) -> ModelConfig:
    """Returns the model without muP, for weights that the muP factors were multiplied into, see `model.mup.folded`."""
    return model.model_copy(update={"mup": None})
