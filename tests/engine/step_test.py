"""What both engines share, beside the parity layouts: both halves of a tied gradient, and the precision of weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from llmtrain.engine.step import sum_tied_gradients

WORKER = Path(__file__).with_name("step_worker.py")


def parameter(gradient: float) -> nn.Parameter:
    """A matrix of zeros whose gradient is `gradient` everywhere."""
    p = nn.Parameter(torch.zeros(3, 2))
    p.grad = torch.full((3, 2), gradient)
    return p


def sums(embed: nn.Parameter, head: nn.Parameter, tied: bool = True, lora: object = None) -> list[float]:
    """The gradients of both after `sum_tied_gradients` on a rank that holds the first stage and the last."""
    config = SimpleNamespace(tie_embeddings=tied, lora=lora)
    first = SimpleNamespace(config=config, embed=SimpleNamespace(weight=embed))
    last = SimpleNamespace(config=config, head=SimpleNamespace(weight=head))
    mesh = SimpleNamespace(has_embedding=True, has_head=True)
    sum_tied_gradients([first, last], mesh, lambda p: p.grad)
    assert all(p.grad.eq(p.grad[0, 0]).all() for p in (embed, head))
    return [p.grad[0, 0].item() for p in (embed, head)]


def test_two_copies_of_a_tied_embedding_on_one_rank_both_have_the_sum() -> None:
    assert sums(parameter(2.0), parameter(5.0)) == [7.0, 7.0]


@pytest.mark.parametrize("settings", [{"tied": False}, {"lora": object()}])
def test_what_is_not_tied_or_not_trained_keeps_its_gradient(settings: dict) -> None:
    assert sums(parameter(2.0), parameter(5.0), **settings) == [2.0, 5.0]


def test_one_parameter_at_both_ends_has_the_sum_already() -> None:
    both = parameter(7.0)
    assert sums(both, both) == [7.0, 7.0]


def test_weights_of_every_stage_in_the_computing_precision_and_biases_of_routers_in_fp32(forked: Callable) -> None:
    done = forked(2, WORKER, timeout_s=60)
    ranks = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0 and len(ranks) == 4, done.stdout[-3000:]
    for rank in ranks:
        fp32 = [name for name, dtype in rank["dtypes"].items() if dtype == "torch.float32"]
        assert fp32 == [f"layers.{layer}.feedforward.router.bias" for layer in (0, 1)], rank
        assert set(rank["dtypes"].values()) == {"torch.float32", "torch.bfloat16"}
        assert rank["wrong"] == []
