"""The loss scale against torch.amp.GradScaler, and what is said of a slow precision."""

from __future__ import annotations

import math

import pytest
import torch

from llmtrain.config.machine import AVX512
from llmtrain.config.schema import EngineConfig
from llmtrain.engine import precision
from llmtrain.engine.precision import MIN_SCALE, START_SCALE, LossScaler, check_device


def fp16(**keys: object) -> LossScaler:
    return LossScaler(EngineConfig(precision="fp16", **keys))


def test_moves_as_in_torch() -> None:
    ours = fp16(loss_scale_window=3)
    theirs = torch.amp.GradScaler("cpu", init_scale=START_SCALE, growth_interval=3)
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([p], lr=1.0)
    for overflow in [True, False, False, False, False, True, False, False, True, True, False, False, False]:
        theirs.scale(p.sum()).backward()
        p.grad.fill_(math.inf if overflow else 1.0)
        theirs.step(optimizer)
        theirs.update()
        assert ours.explains(overflow) == overflow
        assert ours.scale == theirs.get_scale()
        optimizer.zero_grad()


def test_gives_up_where_the_scale_is_no_explanation() -> None:
    scaler = fp16()
    while scaler.scale > MIN_SCALE:
        assert scaler.explains(True)
    assert not scaler.explains(True)
    fixed, bf16 = fp16(loss_scale=8.0), LossScaler(EngineConfig(precision="bf16"))
    assert fixed.scale == 8 and not fixed.explains(True) and fixed.scale == 8
    assert bf16.scale == 1 and not bf16.explains(True)


def test_goes_on_as_it_was() -> None:
    one, two = fp16(loss_scale_window=5), fp16(loss_scale_window=5)
    for overflow in (True, False, False, False):
        one.explains(overflow)
    two.load(one.state())
    for scaler in (one, two):
        scaler.explains(False)
    assert one.scale == two.scale == START_SCALE / 2
    for scaler in (one, two):
        scaler.explains(False)
    assert one.scale == two.scale == START_SCALE
    assert one.state() == two.state() != {}


@pytest.mark.parametrize("keys", [{"precision": "bf16"}, {"precision": "fp16", "loss_scale": 8.0}])
def test_a_scale_that_does_not_move_has_no_state(keys: dict) -> None:
    scaler = LossScaler(EngineConfig(**keys))
    assert scaler.state() == {}
    scale = scaler.scale
    scaler.load({"loss_scale": 2.0, "clean_steps": 1})
    assert scaler.scale == scale


def test_a_cpu_that_is_slow_in_bf16_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(precision, "log", said.append)
    for flags, name in (({"avx2"}, "fp32"), (AVX512, "bf16"), ({"avx2"}, "bf16")):
        monkeypatch.setattr(precision, "cpu_flags", lambda flags=flags: flags)
        check_device(name, torch.device("cpu"))
    assert len(said) == 1 and said[0].startswith("engine.precision=bf16: this CPU") and "use auto" in said[0]
