"""The projection that all blocks are made of."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from llmtrain.model.lora import Adapter


class Linear(nn.Linear):
    """x weight^T + bias, and what an adapter adds. Parallel forms that sum over ranks take `product` without the bias
    and add it after that."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self.lora: Adapter | None = None

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x weight^T, with the adapter's part and perhaps a bias."""
        y = self.weighted(x, bias)
        return y if self.lora is None else y + self.lora(x)

    def weighted(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x weight^T + bias."""
        return F.linear(x, self.weight, bias)

    def whole(self) -> Tensor:
        """weight, with what an adapter adds to it."""
        return self.weight if self.lora is None else self.weight + self.lora.scale * (self.lora.b @ self.lora.a)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.bias)
