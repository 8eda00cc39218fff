from __future__ import annotations

import math

import torch

from llmtrain.losses.reduce import masked_sum


def test_masked_values_add_nothing() -> None:
    x = torch.tensor([[1.0, math.inf], [math.nan, 3.0]], requires_grad=True)
    total = masked_sum(x, torch.tensor([[True, False], [False, True]]))
    total.backward()
    assert total.item() == 4.0
    assert x.grad.tolist() == [[1.0, 0.0], [0.0, 1.0]]
