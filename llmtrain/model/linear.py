"""Defines the linear projection that all blocks are made of."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from llmtrain.model.lora import Adapter


class Linear(nn.Linear):
    """Computes x weight^T + bias, plus the output of its adapter. Tensor-parallel layers that sum over ranks call
    `product` without the bias and add it after the sum."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self.lora: Adapter | None = None

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Returns x weight^T plus the adapter's output, and plus `bias` if it is given."""
        y = self.weighted(x, bias)
        return y if self.lora is None or not self.lora.on else y + self.lora(x)

    def weighted(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Returns x weight^T + bias, without the adapter."""
        return F.linear(x, self.weight, bias)

    def whole(self) -> Tensor:
        """Returns the weight with its adapter, if that is on, merged in."""
        if self.lora is None or not self.lora.on:
            return self.weight
        return self.weight + self.lora.scale * (self.lora.b @ self.lora.a)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.bias)
