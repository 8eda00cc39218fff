"""8-bit products: their arithmetic written out, both gradients, the swap of modules, and the machine they need."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmtrain.config.schema import ModelConfig
from llmtrain.engine.precision import check_device
from llmtrain.model.decoder import Decoder, initialize
from llmtrain.parallel.float8 import E4M3, E5M2, Float8Linear, float8_blocks, float8_linear, quantize

# The kernel sums in fp32 in another order and rounds the result to bf16 (8 bits).
ROUNDING = 1e-2


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    values, factor = quantize(x, dtype)
    return values.float() * factor


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def test_values_use_the_whole_range() -> None:
    values, factor = quantize(torch.tensor([0.5, -2.0, 1.0]), E4M3)
    assert values.float().tolist() == [112.0, -448.0, 224.0] and factor.item() == pytest.approx(2 / 448)
    assert quantize(torch.zeros(4), E5M2)[0].float().tolist() == [0.0] * 4


def test_products_are_those_of_the_rounded_factors() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 16, 32, dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(48, 32, dtype=torch.bfloat16) / 8).requires_grad_()
    y = float8_linear(x, weight, None)
    grad = torch.randn_like(y)
    y.backward(grad)
    a, w, g = rounded(x.detach(), E4M3), rounded(weight.detach(), E4M3), rounded(grad, E5M2)
    assert y.shape == (2, 16, 48) and relative(y, a @ w.t()) < ROUNDING
    assert relative(x.grad, g @ w) < ROUNDING
    assert relative(weight.grad, g.flatten(0, 1).t() @ a.flatten(0, 1)) < ROUNDING
    assert 0.01 < relative(y, x.detach().float() @ weight.detach().float().t()) < 0.06  # three bits of mantissa


def test_only_projections_of_blocks_change() -> None:
    config = ModelConfig(num_layers=2, hidden_size=32, ffn_size=48, num_heads=2, num_kv_heads=2, vocab_size=64)
    model = Decoder(config).to(torch.bfloat16)
    initialize(model, config, seed=0)
    ids, positions = torch.arange(16)[None], torch.arange(16)[None]
    before = model(ids, positions)
    float8_blocks(model)
    changed = {name for name, module in model.named_modules() if isinstance(module, Float8Linear)}
    assert len(changed) == 2 * 7 and all(name.startswith("layers.") for name in changed)
    assert 0 < relative(model(ids, positions), before) < 0.1


def test_the_blocks_of_multi_token_modules_too() -> None:
    sizes = {"hidden_size": 32, "ffn_size": 48, "num_heads": 2, "num_kv_heads": 2, "vocab_size": 64}
    model = Decoder(ModelConfig(num_layers=1, mtp_layers=1, **sizes))
    float8_blocks(model)
    changed = {name.rpartition("block.")[0] for name, m in model.named_modules() if isinstance(m, Float8Linear)}
    assert "mtp.0." in changed


def test_refused_without_such_a_gpu() -> None:
    with pytest.raises(ValueError, match=r"engine\.precision=fp8: needs a GPU of compute capability 8\.9"):
        check_device("fp8", torch.device("cpu"))
    check_device("bf16", torch.device("cpu"))
