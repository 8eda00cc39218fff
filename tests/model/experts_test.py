"""Products of experts and the dispatch to them: grouped, in a loop, and as the formula says, forward and backward."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from llmtrain.config.schema import ModelConfig, MoeConfig
from llmtrain.model.experts import Experts
from llmtrain.model.feedforward import ACTIVATIONS
from llmtrain.model.kernels import grouped as products
from llmtrain.model.kernels.experts_cpu import expert_ffn
from llmtrain.model.kernels.grouped import grouped_pair, grouped_product
from llmtrain.model.kernels.permute import sort_by_expert
from llmtrain.model.moe import dispatch

COUNTS = {
    "uneven": [3, 1, 9, 3],
    "empty ones": [0, 7, 0, 9],
    "all on one": [0, 0, 16, 0],
    "rows of none": [2, 0, 5, 4],
    "no rows": [0, 0, 0, 0],
}


def small(num_experts: int = 4, ffn: int = 24, hidden: int = 16, seed: int = 0) -> Experts:
    moe = MoeConfig(num_experts=num_experts, expert_ffn_size=ffn)
    model = Experts(ModelConfig(hidden_size=hidden, moe=moe))
    torch.manual_seed(seed)
    for p in model.parameters():
        torch.nn.init.normal_(p, 0, 0.3)
    return model


def run(x: Tensor, weight: Tensor, counts: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Returns the output and both gradients."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = grouped_product(x, weight, counts)
    y.backward(grad)
    return y.detach(), x.grad, weight.grad


def check_formula(case: str, x: Tensor, weight: Tensor, grad: Tensor, found: tuple[Tensor, ...]) -> None:
    """Checks output and gradients against products of fp32 copies, and that rows of no group give zeros."""
    counts = torch.tensor(COUNTS[case])
    groups = torch.repeat_interleave(torch.arange(4), counts)
    copies = [each.float().requires_grad_() for each in (x[: len(groups)], weight)]
    y = torch.einsum("ni,noi->no", copies[0], copies[1][groups])
    y.backward(grad[: len(groups)].float())
    for one, other in zip(found, (y, copies[0].grad, copies[1].grad), strict=True):
        torch.testing.assert_close(one[: len(other)].float(), other, atol=1e-5, rtol=2**-8)
        assert one[len(other) :].eq(0).all()


@pytest.mark.parametrize("case", COUNTS)
def test_grouped_and_loop_are_equal(case: str) -> None:
    torch.manual_seed(0)
    x, weight, grad = (torch.randn(size) for size in ((16, 16), (4, 24, 16), (16, 24)))
    counts = torch.tensor(COUNTS[case])
    assert products.grouped_mm_runs("cpu", x.dtype)
    grouped = run(x, weight, counts, grad)
    with patch.object(products, "grouped_mm_runs", lambda *_: False):
        loop = run(x, weight, counts, grad)
    for one, other in zip(grouped, loop, strict=True):
        assert torch.equal(one, other)
    check_formula(case, x, weight, grad, grouped)


class Products(TorchDispatchMode):
    """Notes how many rows each product on a CPU has."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: set[int] = set()

    def __torch_dispatch__(self, func: OpOverload, types: list, args: tuple = (), kwargs: dict | None = None) -> object:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.mm.out):
            self.rows |= {args[0].size(0), args[0].size(1)}  # of y = x w^T; of x^T y
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", COUNTS)
def test_in_bf16_a_cpu_makes_few_kernels(case: str) -> None:
    torch.manual_seed(0)
    x, weight, grad = (torch.randn(size).to(torch.bfloat16) for size in ((16, 16), (4, 24, 16), (16, 24)))
    counts = torch.tensor(COUNTS[case])
    x[counts.sum() :], grad[counts.sum() :] = torch.nan, torch.nan  # of no group: may be anything
    with patch.object(products, "KERNEL_ROWS", 4):
        check_formula(case, x, weight, grad, run(x, weight, counts, grad))
        with Products() as seen:
            product, outer = (f(x, each, counts) for f, each in ((products.product, weight), (products.outer, x)))
    assert product.isfinite().all() and outer.isfinite().all()
    assert len(seen.rows) > 0 or not counts.any()
    assert all(rows % 4 == 0 for rows in seen.rows)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("case", COUNTS)
def test_a_pair_is_two_products(case: str, frozen: bool) -> None:
    torch.manual_seed(0)
    counts, grad = torch.tensor(COUNTS[case]), torch.randn(16, 48)
    x = torch.randn(16, 16, requires_grad=True)
    first, second = (torch.randn(4, 24, 16, requires_grad=not frozen) for _ in range(2))
    apart = torch.cat([grouped_product(x, first, counts), grouped_product(x, second, counts)], 1)
    together = grouped_pair(x, first, second, counts)
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=0)
    wanted = [x] if frozen else [x, first, second]
    for one, other in zip(*(torch.autograd.grad(y, wanted, grad) for y in (together, apart)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)  # 48 products summed in one go or in two


def test_widths_and_types_that_the_kernel_refuses() -> None:
    torch.manual_seed(0)
    for rows, columns, dtype in ((7, 16, torch.float32), (16, 6, torch.float32), (8, 8, torch.float64)):
        x, weight = (torch.randn(size, dtype=dtype) for size in ((5, columns), (2, rows, columns)))
        y, *_ = run(x, weight, torch.tensor([2, 3]), torch.ones(5, rows, dtype=dtype))
        torch.testing.assert_close(y, torch.cat([x[:2] @ weight[0].T, x[2:] @ weight[1].T]))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("case", COUNTS)
def test_the_cpu_does_what_three_grouped_products_do(case: str, act: str, dtype: torch.dtype, frozen: bool) -> None:
    torch.manual_seed(0)
    counts = torch.tensor(COUNTS[case])
    x, weights = torch.randn(16, 16).to(dtype).requires_grad_(), torch.rand(16).to(dtype).requires_grad_()
    sizes = ((4, 24, 16), (4, 24, 16), (4, 16, 24))
    matrices = [(torch.randn(size) / 4).to(dtype).requires_grad_(not frozen) for size in sizes]

    def grouped() -> Tensor:
        gate, up, down = matrices
        h = ACTIVATIONS[act](grouped_product(x, gate, counts)) * grouped_product(x, up, counts)
        return grouped_product(h * weights[:, None], down, counts)

    results = []
    for y in (expert_ffn(x, weights, *matrices, counts, act)[0], grouped()):
        wanted = [x, weights] if frozen else [x, weights, *matrices]
        results.append([y, *torch.autograd.grad(y.square().sum(), wanted)])
    tolerance = 1e-5 if dtype == torch.float32 else 0.05  # roundings of bf16 in another order
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(
            one, other, atol=tolerance * float(other.detach().abs().amax().clamp(min=1e-3)), rtol=0
        )


def test_gradients_by_finite_differences() -> None:
    model = small(ffn=5, hidden=3).double()
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([[0, 2], [2, 1], [4, 4], [0, 1], [2, 0], [4, 3]])  # 4 is none
    weights = torch.rand(6, 2, dtype=torch.float64, requires_grad=True)

    def f(x: Tensor, weights: Tensor, *parameters: Tensor) -> Tensor:
        for name, p in zip(("gate", "up", "down"), parameters, strict=True):
            model._parameters[name] = p
        return dispatch(x, indices, weights, model)

    assert torch.autograd.gradcheck(f, (x, weights, *model.parameters()))


def dense(x: Tensor, indices: Tensor, weights: Tensor, model: Experts) -> Tensor:
    """Computes every expert on every token."""
    y = torch.zeros_like(x)
    for e in range(model.gate.size(0)):
        out = (ACTIVATIONS[model.activation](x @ model.gate[e].T) * (x @ model.up[e].T)) @ model.down[e].T
        y = y + out * (weights * (indices == e)).sum(1, keepdim=True)
    return y


@pytest.mark.parametrize("case", ["spread", "one", "two", "none of some", "none at all"])
def test_dispatch_is_the_formula(case: str) -> None:
    model, x = small(), torch.randn(40, 16, generator=torch.Generator().manual_seed(1))
    indices = torch.stack([torch.randperm(4, generator=torch.Generator().manual_seed(i))[:2] for i in range(40)])
    indices = {"one": torch.full((40, 1), 3), "two": torch.tensor([[1, 2]] * 40)}.get(case, indices)
    indices[: {"none of some": 13, "none at all": 40}.get(case, 0)] = 4
    weights = torch.rand(indices.shape, generator=torch.Generator().manual_seed(2))
    results = []
    for f in (dispatch, dense):
        model.zero_grad()
        a, w = x.clone().requires_grad_(), weights.clone().requires_grad_()
        y = f(a, indices, w, model)
        y.square().sum().backward()
        results.append((y, a.grad, w.grad, *(p.grad for p in model.parameters())))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_a_token_does_not_see_its_batch() -> None:
    model, x = small(), torch.randn(30, 16, generator=torch.Generator().manual_seed(1))
    indices = torch.randint(0, 4, (30, 1), generator=torch.Generator().manual_seed(2))
    together = dispatch(x, indices, torch.ones(30, 1), model)
    for i in (0, 7, 29):
        alone = dispatch(x[i : i + 1], indices[i : i + 1], torch.ones(1, 1), model)
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-6, rtol=1e-6)


def test_sorting_worked_by_hand() -> None:
    order, places, counts = sort_by_expert(torch.tensor([[1, 0], [2, 1], [0, 3]]), 3)
    assert order.tolist() == [1, 4, 0, 3, 2, 5]  # flat places of experts 0 0 1 1 2 and none
    assert places.tolist() == [[2, 0], [4, 3], [1, 5]]
    assert counts.tolist() == [2, 2, 1]
