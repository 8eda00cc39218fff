"""What both engines share, beside the parity layouts: both halves of a tied gradient, and the precision of weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from llmtrain.arch.resolve import resolve_model
from llmtrain.config.schema import EngineConfig, ModelConfig, OptimConfig, ParallelConfig
from llmtrain.engine.build import Role, build_trained
from llmtrain.engine.step import sum_tied_gradients
from llmtrain.losses.token import token_loss
from llmtrain.model.decoder import init_tensor, parameter_shapes
from llmtrain.parallel.mesh import init_mesh, shutdown
from llmtrain.types import Batch

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


@pytest.mark.parametrize("backend", ["deepspeed", "fsdp"])
def test_the_learning_rate_is_that_of_the_position_or_of_the_updates_made(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    mesh = init_mesh(ParallelConfig(), None, 60)
    try:
        optim = OptimConfig(lr=1.0, min_lr=0.0, warmup_steps=0, schedule="linear")
        settings = EngineConfig(backend=backend, precision="fp32")
        model = resolve_model(
            ModelConfig(num_layers=1, hidden_size=16, ffn_size=24, num_heads=2, num_kv_heads=2, vocab_size=32)
        )
        shapes = parameter_shapes(model)
        source = lambda name: init_tensor(name, shapes[name], model, 0)  # noqa: E731
        engine = build_trained(Role("main", model, ParallelConfig(), settings, source, optim, 5), mesh)
        ids = torch.arange(16).view(2, 8)
        batch = Batch(ids, ids + 1, torch.ones(2, 8, dtype=torch.bool), torch.arange(8).expand(2, 8))
        rates = [engine.train_step([batch], token_loss, torch.tensor(16.0), at).lr for at in (None, None, 3, None, 4)]
        assert rates == [1.0, 0.75, 0.25, 0.25, 0.0] and engine.step == 5
    finally:
        shutdown()


def test_weights_of_every_stage_in_the_computing_precision_and_biases_of_routers_in_fp32(forked: Callable) -> None:
    done = forked(2, WORKER, timeout_s=60)
    ranks = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0 and len(ranks) == 4, done.stdout[-3000:]
    for rank in ranks:
        fp32 = [name for name, dtype in rank["dtypes"].items() if dtype == "torch.float32"]
        assert fp32 == [f"layers.{layer}.feedforward.router.bias" for layer in (0, 1)], rank
        assert set(rank["dtypes"].values()) == {"torch.float32", "torch.bfloat16"}
        assert rank["wrong"] == []
