"""The projection that all blocks are made of."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from llmtrain.model.lora import Adapter


class Linear(nn.Linear):
    """x weight^T + bias, and what an adapter adds. `product` is the part without bias, which parallel forms sum over
    ranks before they add it."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self.lora: Adapter | None = None

    def product(self, x: Tensor) -> Tensor:
        """x weight^T, with the adapter's part."""
        y = self.weighted(x)
        return y if self.lora is None else y + self.lora(x)

    def weighted(self, x: Tensor) -> Tensor:
        """x weight^T."""
        return F.linear(x, self.weight)

    def whole(self) -> Tensor:
        """weight, with what an adapter adds to it."""
        return self.weight if self.lora is None else self.weight + self.lora.scale * (self.lora.b @ self.lora.a)

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x)
        return y if self.bias is None else y + self.bias
