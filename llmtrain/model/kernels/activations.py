"""Computes activation functions that have a form of their own for compilers."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def gelu_tanh(x: Tensor) -> Tensor:
    """Returns x (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3) (arXiv 1606.08415). A compiler on a CPU gets
    it as x sigmoid(2 u), which is the same function: an exponential takes less time there than a tanh."""
    if x.device.type != "cpu" or not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    z, factor = x.float(), math.sqrt(8 / math.pi)
    return (z * torch.sigmoid(z * (factor + 0.044715 * factor * z * z))).to(x.dtype)
