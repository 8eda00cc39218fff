"""Blocks with experts in training: rematerialised, compiled, in bf16."""

from __future__ import annotations

from types import ModuleType
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from llmtrain.config.schema import ModelConfig, MoeConfig
from llmtrain.model.decoder import Decoder, initialize
from llmtrain.model.kernels import experts_cpu, grouped
from llmtrain.model.kernels.experts import by_grouped_products
from llmtrain.parallel.plan import compile_blocks
from llmtrain.parallel.remat import remat_blocks

MOE = MoeConfig(num_experts=6, top_k=2, expert_ffn_size=24, shared_ffn_size=16, dense_layers=[0], balance="aux")
MODEL = ModelConfig(
    **{"num_layers": 3, "hidden_size": 32, "ffn_size": 48, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 64},
    moe=MOE.model_copy(update={"aux_coef": 0.5, "z_coef": 0.1}),
)
IDS = torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(0))
SEGMENTS = torch.tensor([[0] * 10 + [1] * 10 + [-1] * 4, [0] * 24])


def decoder(dtype: torch.dtype = torch.float32) -> Decoder:
    model = Decoder(MODEL)
    initialize(model, MODEL, 0)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5 if p.dim() > 1 else 1)
    for counts in all_counts(model):
        counts.loss_factor = 0.1
    return model.to(dtype).train()


def all_counts(model: nn.Module) -> list:
    return [m.router.counts for m in model.modules() if hasattr(m, "router")]


def step(model: Decoder) -> dict[str, Tensor]:
    """Gradients of one microbatch, by name."""
    model.zero_grad()
    logits = model(IDS, torch.arange(24).expand_as(IDS), SEGMENTS)
    logits.float().log_softmax(-1)[SEGMENTS >= 0][:, 3].sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_rematerialised_gradients_are_equal_and_counted_once(kind: str) -> None:
    plain, remat = decoder(), decoder()
    remat_blocks(remat, kind)
    expected = step(plain)
    for name, gradient in step(remat).items():
        assert torch.equal(gradient, expected[name]), name
    for one, other in zip(all_counts(plain), all_counts(remat), strict=True):
        assert one.tokens == 44 and one.load.sum() == 88
        assert torch.equal(one.load, other.load) and torch.equal(one.losses, other.losses)
    step(remat)
    assert all(counts.tokens == 88 for counts in all_counts(remat))


def test_selective_keeps_the_products_but_the_last_on_a_gpu() -> None:
    """In blocks with experts gate and up of each are computed once, down again."""
    with patch("llmtrain.model.experts.expert_feedforward", by_grouped_products):
        counts = {kind: calls(grouped, "_zero_rest", kind) for kind in ("none", "selective", "full")}  # once in each
    layers = 2
    assert counts["none"] == layers * (3 + 3)  # forward, and the gradient of what goes in
    assert counts["selective"] - counts["none"] == layers
    assert counts["full"] - counts["none"] == layers * 3


def test_selective_keeps_a_pair_as_two_products() -> None:
    """A compiler on a CPU computes gate and up at once: they are kept, down is computed again."""
    with patch("llmtrain.model.kernels.experts.torch.compiler.is_compiling", lambda: True):
        counts = {kind: calls(grouped, "_zero_rest", kind) for kind in ("none", "selective", "full")}
    layers = 2
    assert counts["none"] == layers * (2 + 2)
    assert counts["selective"] - counts["none"] == layers
    assert counts["full"] - counts["none"] == layers * 2


def test_selective_keeps_the_experts_on_a_cpu() -> None:
    counts = {kind: calls(experts_cpu, "product", kind) for kind in ("none", "selective", "full")}
    layers = 2
    assert counts["none"] == counts["selective"] == layers * (3 + 3)  # forward, and the gradient of what goes in
    assert counts["full"] - counts["none"] == layers * 3


def calls(module: ModuleType, function: str, kind: str) -> int:
    """Returns how often one step calls a function."""
    model = decoder()
    if kind != "none":
        remat_blocks(model, kind)
    with patch.object(module, function, wraps=getattr(module, function)) as counted:
        step(model)
    return counted.call_count


def test_gradients_in_bf16() -> None:
    """Gradients are those of fp32 to a few bits: at these weights the same experts are chosen."""
    expected, found = step(decoder()), step(decoder(torch.bfloat16))
    for name, gradient in found.items():
        assert gradient.dtype == torch.bfloat16
        error = (gradient.float() - expected[name]).norm() / expected[name].norm()
        assert error < 0.2, (name, error)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["none", "selective", "full"])
def test_compiled_gradients_are_equal(kind: str) -> None:
    """One whole graph serves all blocks with experts, in fp32; a new factor of the losses compiles nothing anew."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, compiled = decoder(), decoder()
    if kind != "none":
        remat_blocks(compiled, kind)
    compile_blocks([compiled])
    for factor in (0.1, 0.7):
        for counts in (*all_counts(plain), *all_counts(compiled)):
            counts.loss_factor = factor
            counts.reset()
        expected = step(plain)
        for name, gradient in step(compiled).items():
            torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4)
        for one, other in zip(all_counts(plain), all_counts(compiled), strict=True):
            assert torch.equal(one.load, other.load) and one.tokens == other.tokens == 44
    found = torch._dynamo.utils.counters
    assert not found["graph_break"] and found["stats"]["unique_graphs"] <= 2  # of the dense block, and the others
