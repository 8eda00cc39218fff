"""Compares the norm and the rotation of eager fp32 on a CPU with torch's and the formula."""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from llmtrain.model.kernels.eager import RmsNorm, Rotation, is_eager_cpu_fp32
from llmtrain.model.rope import apply_rope, rope_angles, rope_frequencies


def both(f: Callable[..., Tensor], g: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
    """Compares values and gradients of two functions."""
    found = []
    for function in (f, g):
        y = function(*inputs)
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        found.append((y, *torch.autograd.grad(y, [x for x in inputs if x.requires_grad], grad)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=2e-5)  # sums over up to 42 rows in another order


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("shape", [(3, 14, 24), (2, 4, 5, 16), (7, 8)])
def test_norm_is_that_of_torch(shape: tuple[int, ...], frozen: bool) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(shape[-1]).requires_grad_(not frozen)
    both(lambda x, w: RmsNorm.apply(x, w, 1e-3), lambda x, w: F.rms_norm(x, shape[-1:], w, 1e-3), (x, weight))
    assert torch.equal(RmsNorm.apply(x, weight, 1e-3), F.rms_norm(x, shape[-1:], weight, 1e-3))


def test_norm_of_transposed_heads() -> None:
    x = torch.randn(2, 5, 4, 16, requires_grad=True)
    weight = torch.randn(16, requires_grad=True)
    both(
        lambda x, w: RmsNorm.apply(x.transpose(1, 2), w, 1e-5),
        lambda x, w: F.rms_norm(x.transpose(1, 2), (16,), w, 1e-5),
        (x, weight),
    )


def test_norm_by_finite_differences() -> None:
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: RmsNorm.apply(x, w, 0.1), (x, weight))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_is_the_formula(interleaved: bool) -> None:
    positions = torch.arange(5).repeat(2, 1)
    cos, sin = rope_angles(positions, rope_frequencies(8, 100.0, None, torch.device("cpu")), torch.float32)
    x = torch.randn(2, 5, 3, 8).requires_grad_()

    def plain(x: Tensor) -> Tensor:
        a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    both(lambda x: Rotation.apply(x.transpose(1, 2), cos, sin, interleaved), lambda x: plain(x.transpose(1, 2)), (x,))
    assert torch.equal(apply_rope(x.transpose(1, 2), cos, sin, interleaved), plain(x.transpose(1, 2)))


def test_who_uses_them() -> None:
    x = torch.zeros(2)
    assert is_eager_cpu_fp32(x)
    for other in (x.bfloat16(), x.double(), torch.zeros(2, device="meta")):
        assert not is_eager_cpu_fp32(other)
    with patch("torch.compiler.is_compiling", lambda: True):
        assert not is_eager_cpu_fp32(x)
