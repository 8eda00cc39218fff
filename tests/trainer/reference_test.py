"""The reference of a policy with adapters is that policy without them: the scores of the frozen base, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llmtrain.config.load import load
from llmtrain.config.recipes import RECIPES
from llmtrain.config.schema import LoraConfig
from llmtrain.model.linear import Linear
from llmtrain.model.lora import Adapter, adapters_off
from llmtrain.trainer.reference import add_reference, build_reference
from llmtrain.types import Batch, Scores
from tests.parity.lora_test import ALL, LATENT
from tests.recipes.stubs import StubScorer

WORKER = Path(__file__).with_name("reference_worker.py")
FOUR = [
    {"pp": 2, "tp": 2, "zero_stage": 1, "model": ALL},
    {"dp_shard": 2, "tp": 2, "zero_stage": 3, "sequence_parallel": False, "model": ALL},
    {"dp_shard": 2, "cp": 2, "backend": "fsdp", "precision": "bf16", "model": ALL},
]
MORE = [
    {"dp_replicate": 4, "zero_stage": 0, "model": ALL},
    {"dp_shard": 4, "zero_stage": 2, "precision": "bf16", "model": ALL},
    {"dp_shard": 2, "pp": 2, "zero_stage": 3, "model": ALL},
    {"pp": 2, "tp": 2, "backend": "fsdp", "virtual_stages": 2, "schedule": "zbv", "reshard": False, "model": ALL},
    {"pp": 2, "tp": 2, "zero_stage": 1, "remat": "selective", "model": ALL},
    {"dp_shard": 2, "tp": 2, "backend": "fsdp", "remat": "full", "model": ALL},
    {"dp_shard": 2, "tp": 2, "zero_stage": 1, "offload": "optimizer", "model": ALL},
    {"dp_shard": 2, "tp": 2, "zero_stage": 1, "model": LATENT},
    {"dp_shard": 2, "tp": 2, "zero_stage": 1, "compile": True, "model": ALL},
    {"pp": 2, "tp": 2, "backend": "fsdp", "compile": True, "model": ALL},
]


def check(forked: Callable, layouts: list[dict], timeout_s: float) -> None:
    result = forked(4, WORKER, json.dumps(layouts), timeout_s=timeout_s)
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"layout"')]
    assert len(lines) == len(layouts), result.stdout[-3000:]
    for line in lines:
        for seen in line["ranks"]:
            # What is compiled is fused, the frozen model is not.
            assert seen["error"] <= (1e-6 if line["layout"].get("compile") else 0.0), line
            assert seen["moved"] > 1e-2, line  # the adapters do something, else the line above says nothing
            assert seen["same"] and seen["left"] == 0, line  # training does not notice


def test_the_base_without_a_model_of_its_own(forked: Callable) -> None:
    check(forked, FOUR, timeout_s=120)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_base_on_more_layouts(forked: Callable) -> None:
    check(forked, MORE, timeout_s=800)


def test_adapters_come_back_after_an_error_too() -> None:
    layer, x = Linear(4, 3, bias=False), torch.randn(2, 4)
    layer.lora = Adapter(4, 3, LoraConfig(rank=2, alpha=4.0))
    for p in layer.parameters():
        torch.nn.init.normal_(p)
    added = 2 * x @ layer.lora.a.T @ layer.lora.b.T  # alpha / rank
    with pytest.raises(ZeroDivisionError), adapters_off([layer]):
        assert torch.equal(layer(x), x @ layer.weight.T) and torch.equal(layer.whole(), layer.weight)
        raise ZeroDivisionError
    for found in (x @ layer.weight.T + added, x @ layer.whole().T):  # sums of terms of up to 10, some near 0
        torch.testing.assert_close(layer(x), found, rtol=0, atol=2e-5)


def test_no_reference_where_none_is_wanted() -> None:
    assert build_reference(SimpleNamespace(), wanted=False) is None
    batch = Batch(*(torch.zeros(1, 2, dtype=torch.int64),) * 4)
    add_reference([batch], None)
    assert batch.extra == {}
    add_reference([batch], StubScorer(lambda _: Scores(logprobs=torch.tensor([[-1.0, -2.0]]))))
    assert batch.extra["ref_logprobs"].tolist() == [[-1.0, -2.0]]


def test_a_reference_that_waits_comes_to_score(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []  # where it is when it scores
    frozen = StubScorer(lambda _: seen.append(frozen.here) or Scores(logprobs=torch.tensor([[-1.0, -2.0]])))
    monkeypatch.setattr("llmtrain.trainer.reference.build_frozen", lambda role, mesh: frozen)
    monkeypatch.setattr("llmtrain.trainer.reference.start_source", lambda job: None)
    about = SimpleNamespace(lora=None)
    job = SimpleNamespace(model=about, mesh=None, config=SimpleNamespace(parallel=None, engine=None))
    assert build_reference(job, wanted=True) is frozen and frozen.here
    waiting = build_reference(job, wanted=True, waits=True)
    assert not frozen.here and waiting.parts is frozen.parts
    batch = Batch(*(torch.zeros(1, 2, dtype=torch.int64),) * 4)
    add_reference([batch], waiting)
    assert seen == [True] and not frozen.here and batch.extra["ref_logprobs"].tolist() == [[-1, -2]]
    waiting.to_device()
    assert not frozen.here


@pytest.mark.parametrize(
    ("more", "others"),
    [((), ()), (("grpo.kl_coef=0.1",), ("a frozen reference",)), (("grpo.kl_coef=0.1", "model.lora={rank: 4}"), ())],
)
def test_the_planner_knows_what_a_reference_costs(small: Path, more: tuple[str, ...], others: tuple[str, ...]) -> None:
    assert RECIPES["grpo"].other_models(load(str(small), ["model.init_from=somewhere", *more])) == others
