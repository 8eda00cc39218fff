"""What travels to experts is counted where they compute it, so that a row lost on the way shows."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from llmtrain.config.schema import ModelConfig, MoeConfig
from llmtrain.model.balance import RouterCounts
from llmtrain.model.experts import Experts
from llmtrain.parallel import expert
from llmtrain.parallel.expert import ExpertPieces, exchanged

MOE = MoeConfig(num_experts=8, top_k=2, expert_ffn_size=16)
TOKENS = 20


def half(tp_rank: int) -> ExpertPieces:
    """Of two tensor-parallel ranks without expert parallelism."""
    mesh = SimpleNamespace(ep=1, ep_rank=0, sizes={"tp": 2}, coords={"tp": tp_rank}, groups={"ep": None})
    return ExpertPieces(MOE.num_experts, mesh)


def passed(indices: Tensor, tp_rank: int, router_counts: RouterCounts) -> Tensor:
    """What the half's experts give, of random weights."""
    experts = Experts(ModelConfig(hidden_size=16, moe=MOE))
    for p in experts.parameters():
        p.data = torch.nn.init.normal_(p.data[: MOE.num_experts // 2].clone())
    x = torch.randn(TOKENS, 16, requires_grad=True)
    return exchanged(x, indices, torch.rand(indices.shape), experts, half(tp_rank), router_counts)


def computed(indices: Tensor, tp_rank: int, router_counts: RouterCounts) -> int:
    passed(indices, tp_rank, router_counts).sum().backward()
    return int(router_counts.computed)


@pytest.fixture
def choices() -> Tensor:
    torch.manual_seed(0)
    indices = torch.stack([torch.randperm(MOE.num_experts)[: MOE.top_k] for _ in range(TOKENS)])
    indices[:3] = MOE.num_experts  # padding goes nowhere
    return indices


def test_the_halves_compute_all_choices(choices: Tensor) -> None:
    found = [computed(choices, tp_rank, RouterCounts(MOE)) for tp_rank in (0, 1)]
    assert found == [int((choices < 4).sum()), int(((choices >= 4) & (choices < 8)).sum())]
    assert sum(found) == (TOKENS - 3) * MOE.top_k


def test_microbatches_add_up_until_the_reset(choices: Tensor) -> None:
    router_counts = RouterCounts(MOE)
    once = computed(choices, 0, router_counts)
    assert computed(choices, 0, router_counts) == 2 * once
    router_counts.reset()
    assert router_counts.computed is None


def test_a_lost_row_shows(choices: Tensor) -> None:
    sort = expert.sort_by_expert

    def losing(indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
        order, places, counts = sort(indices, num_experts)
        counts = counts.clone()
        counts[-1] -= 1  # the last row of the last expert is taken for none's
        return order, places, counts

    whole = computed(choices, 0, RouterCounts(MOE))
    with patch.object(expert, "sort_by_expert", losing):
        assert computed(choices, 0, RouterCounts(MOE)) == whole - 1


def test_scoring_counts_nothing(choices: Tensor) -> None:
    router_counts = RouterCounts(MOE)
    with torch.no_grad():
        passed(choices, 0, router_counts)
    assert router_counts.computed is None
