"""Schedules by hand, and which parameter gets which treatment."""

from __future__ import annotations

import math

import pytest
import torch

from llmtrain.config.schema import ModelConfig, OptimConfig
from llmtrain.engine.muon import Muon
from llmtrain.engine.optim import build_optimizer, initial_state, learning_rate, state_keys
from llmtrain.model.decoder import Decoder
from llmtrain.parallel.placement import Placement


def rates(total_steps: int, **settings: object) -> list[float]:
    config = OptimConfig(**{"lr": 1.0, "min_lr": 0.1, "warmup_steps": 0, **settings})
    return [learning_rate(step, config, total_steps) for step in range(total_steps)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"schedule": "constant", "warmup_steps": 4}, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        ({"schedule": "linear", "warmup_steps": 2, "min_lr": 0.0}, [0.5, 1, 1, 0.8, 0.6, 0.4, 0.2, 0]),
        # cos of 0, 60, 120, 180 degrees: 1, 0.5, -0.5, -1
        ({"schedule": "cosine", "warmup_steps": 4}, [0.25, 0.5, 0.75, 1, 1, 0.775, 0.325, 0.1]),
        # the last half of 8 steps falls, from the 4th on lr to the 8th on min_lr
        ({"schedule": "wsd", "wsd_decay_share": 0.5, "min_lr": 0.2}, [1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]),
        # the fall cannot begin before the warmup ends
        (
            {"schedule": "wsd", "wsd_decay_share": 1.0, "warmup_steps": 5, "min_lr": 0.0},
            [0.2, 0.4, 0.6, 0.8, 1, 1, 0.5, 0],
        ),
    ],
)
def test_schedules(settings: dict, expected: list[float]) -> None:
    assert rates(8, **settings) == pytest.approx(expected)


def test_llama_3_405b() -> None:
    """arXiv 2407.21783, section 3.4.1: 8e-5 after 8,000 warmup steps, cosine to 8e-7 over 1,200,000 steps."""
    config = OptimConfig(lr=8e-5, min_lr=8e-7, warmup_steps=8000, schedule="cosine")

    def at(step: int) -> float:
        return learning_rate(step, config, 1_200_000)

    assert (at(0), at(3999), at(7999)) == pytest.approx((1e-8, 4e-5, 8e-5))
    assert at(8000) == 8e-5 and at(1_199_999) == 8e-7  # exactly
    assert at(8001) < 8e-5 and at(1_199_998) > 8e-7
    assert at(8000 + 595_999) + at(8000 + 596_000) == pytest.approx(8e-5 + 8e-7)  # symmetric about the middle


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
@pytest.mark.parametrize(("total_steps", "warmup_steps"), [(2, 0), (2, 1), (7, 3), (1000, 100)])
def test_the_last_update_has_exactly_min_lr(schedule: str, total_steps: int, warmup_steps: int) -> None:
    found = rates(total_steps, schedule=schedule, lr=0.3, warmup_steps=warmup_steps)
    peak = warmup_steps if total_steps - warmup_steps > 1 else warmup_steps - 1
    assert found[peak] == 0.3 and max(found) == 0.3
    assert found[-1] == (0.1 if peak == warmup_steps else 0.3)  # a single update after the warmup is at the peak
    config = OptimConfig(lr=0.3, min_lr=0.1, warmup_steps=0, schedule=schedule)
    assert learning_rate(total_steps + 5, config, total_steps) == 0.1


def decoder(tied: bool = True) -> Decoder:
    """With the placements that `parallel.placement.place` sets."""
    model = Decoder(
        ModelConfig(
            num_layers=1, hidden_size=8, ffn_size=16, vocab_size=32, num_heads=2, num_kv_heads=1, tie_embeddings=tied
        )
    )
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p)
        p.placement = Placement(name, tuple(p.shape))
    return model


def decays(model: Decoder, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    of = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    return {name: of[p] for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weight_decay_on_matrices_and_embeddings_only(name: str) -> None:
    model = decoder(tied=False)
    model.norm.bias = torch.nn.Parameter(torch.zeros(8))
    model.norm.bias.placement = Placement("norm.bias", (8,))
    found = decays(model, build_optimizer(model, OptimConfig(name=name, weight_decay=0.3)))
    assert len(found) == 13
    for parameter, decay in found.items():
        assert decay == (0.0 if "norm" in parameter else 0.3), parameter


def test_muon_takes_the_matrices_of_blocks() -> None:
    model = decoder()
    optimizer = build_optimizer(model, OptimConfig(name="muon"))
    assert isinstance(optimizer, Muon)
    muon = {p.placement.name for p in optimizer.param_groups[0]["params"]}
    blocks = [*(f"attention.{x}" for x in "qkvo"), *(f"feedforward.{x}" for x in ("gate", "up", "down"))]
    assert muon == {f"layers.0.{block}.weight" for block in blocks}
    for p in model.parameters():
        keys = ("momentum",) if p.placement.name in muon else ("exp_avg", "exp_avg_sq")
        assert state_keys(p) == keys
        state = initial_state(p, 7)
        assert tuple(key for key in state if key != "step") == keys
        assert all(v.shape == p.shape and not v.any() for k, v in state.items() if k != "step")
        assert ("step" in state) == (p.placement.name not in muon)
    assert float(initial_state(torch.zeros(3), 7)["step"]) == 7  # a flat piece


def test_the_state_of_a_resumed_optimizer_is_that_of_a_fresh_one() -> None:
    """`initial_state` at step 0 changes nothing: first update by hand, AdamW's is lr * sign(gradient) / (1 + eps)."""
    for name in ("adamw", "muon"):
        weights = []
        for prepared in (False, True):
            torch.manual_seed(0)
            model = decoder()
            optimizer = build_optimizer(model, OptimConfig(name=name, lr=0.5, weight_decay=0.0))
            if prepared:
                optimizer.state.update({p: initial_state(p, 0) for p in model.parameters()})
            before = model.norm.weight.detach().clone()
            for p in model.parameters():
                p.grad = torch.randn(p.shape)
            optimizer.step()
            assert torch.allclose(model.norm.weight, before - 0.5 * model.norm.weight.grad.sign(), atol=1e-5)
            weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        assert torch.equal(*weights) and math.isfinite(float(weights[0].sum()))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_group_follows_the_learning_rate(name: str) -> None:
    model = decoder()
    optimizer = build_optimizer(model, OptimConfig(name=name))
    before = [p.detach().clone() for p in model.parameters()]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for p in model.parameters():
        p.grad = torch.randn(p.shape)
    optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
