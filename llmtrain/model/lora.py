"""Implements low-rank adapters (LoRA, arXiv 2106.09685): a projection adds alpha / rank B (A x) to W x, and only A and
B are trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmtrain.arch.adapters import adapter_of
from llmtrain.config.schema import LoraConfig, ModelConfig


class Adapter(nn.Module):
    """Computes scale B (A x), [..., out], of x [..., in], in the precision of x even where the projection uses fp8."""

    on = True  # False: the projection adds nothing, see `adapters_off`

    def __init__(self, in_features: int, out_features: int, lora: LoraConfig) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(lora.rank, in_features))
        self.b = nn.Parameter(torch.empty(out_features, lora.rank))
        self.scale = lora.alpha / lora.rank

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_with(x, self.a, self.b)

    def apply_with(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Returns the adapter's output with the given matrices."""
        return F.linear(F.linear(x, a) * self.scale, b)


def add_adapters(model: nn.Module, lora: LoraConfig) -> None:
    """Gives the targeted projections of `model.layers` an adapter each, in place, and freezes everything else."""
    model.requires_grad_(False)
    for name, module in list(model.layers.named_modules()):
        if name.rpartition(".")[2] in lora.targets and isinstance(module, nn.Linear):
            module.lora = Adapter(module.in_features, module.out_features, lora)


@contextmanager
def adapters_off(parts: Sequence[nn.Module]) -> Iterator[None]:
    """Makes the models compute without their adapters while the context lasts, which is what they were trained from.

    Adapters stay where they are and as they are. A compiled block has a graph for each of the two.
    """
    adapters = [module for part in parts for module in part.modules() if isinstance(module, Adapter)]
    try:
        for adapter in adapters:
            adapter.on = False
        yield
    finally:
        for adapter in adapters:
            adapter.on = True


def initial_adapter(leaf: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Returns the initial value of `b`, 0, so that training starts from the base, or of `a`, uniform in
    +-1 / sqrt(in), as in peft."""
    if leaf == "b":
        return torch.zeros(shape)
    return (torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(shape[1])


def merged(name: str, model: ModelConfig, read: Callable[[str], Tensor]) -> Tensor:
    """Returns the parameter `name` of the base with its adapter, if there is one, added in fp32: W + scale B A. `read`
    gives whole tensors of base and adapters by canonical name."""
    weight, adapter = read(name), adapter_of(model, name)
    if adapter is None or model.lora is None:
        return weight
    a, b = (read(f"{adapter}.{leaf}").float() for leaf in ("a", "b"))
    return (weight.float() + model.lora.alpha / model.lora.rank * (b @ a)).to(weight.dtype)
