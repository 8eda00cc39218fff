"""Reduces under a mask: the one place where a loss meets its mask."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Returns the sum of `x` where `mask` (bool, same shape) is True, a scalar.

    What is masked adds nothing to value or gradient, even if it is infinite or NaN (a product would give inf * 0).
    """
    return torch.where(mask, x, 0.0).sum()
