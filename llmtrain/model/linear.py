"""The projection that all blocks are made of."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class Linear(nn.Linear):
    """x weight^T + bias. `product` is the part without bias, which parallel forms sum over ranks before they add it."""

    def product(self, x: Tensor) -> Tensor:
        """x weight^T."""
        return F.linear(x, self.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x)
        return y if self.bias is None else y + self.bias
