"""Checks activation functions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from llmtrain.model.kernels.activations import gelu_tanh


def value_and_gradient(f: object, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    y = f(x)
    return torch.stack([y, *torch.autograd.grad(y.sum(), x)]).detach()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 4e-6), (torch.bfloat16, 2**-7)])
def test_the_form_for_compilers_is_the_published_one(dtype: torch.dtype, tolerance: float) -> None:
    """The forms agree to rounding, which the derivative multiplies by x times that of u, up to 34."""
    x = torch.linspace(-6, 6, 4096).to(dtype)
    expected = value_and_gradient(lambda x: F.gelu(x, approximate="tanh"), x.double())
    for form in (gelu_tanh, torch.compile(gelu_tanh)):
        found = value_and_gradient(form, x)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)
