"""Computes the feed-forward layers of all experts at once, in the form that is fastest on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from llmtrain.model.feedforward import ACTIVATIONS
from llmtrain.model.kernels.experts_cpu import expert_ffn
from llmtrain.model.kernels.grouped import grouped_pair, grouped_product


def expert_feedforward(
    x: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor, counts: Tensor, activation: str
) -> Tensor:
    """Returns down(act(gate(x)) * up(x) * weights), [N, hidden], each row of x [N, hidden] by its own expert.

    Rows are sorted by expert, counts [E] int64 of them each; those beyond the last expert give zeros. weights [N];
    gate, up [E, ffn, hidden]; down [E, hidden, ffn]. On a CPU without a compiler the three products are one operation.
    """
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        return expert_ffn(x, weights, gate, up, down, counts, activation)[0]
    return by_grouped_products(x, weights, gate, up, down, counts, activation)


def by_grouped_products(
    x: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor, counts: Tensor, activation: str
) -> Tensor:
    """Returns what `expert_feedforward` does, as products on a GPU, and for a compiler, which fuses what is between."""
    if x.device.type == "cpu" and torch.compiler.is_compiling():  # what stands side by side costs an eager CPU more
        g, u = grouped_pair(x, gate, up, counts).chunk(2, 1)
    else:
        g, u = grouped_product(x, gate, counts), grouped_product(x, up, counts)
    return grouped_product(ACTIVATIONS[activation](g) * u * weights[:, None], down, counts)
