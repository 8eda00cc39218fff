"""Several engines of any kinds in one process: each does what it does alone, bit for bit."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._dynamo import config as dynamo

from llmtrain.arch.resolve import resolve_model
from llmtrain.config.schema import EngineConfig, ModelConfig, ParallelConfig
from llmtrain.engine.build import Role, build_trained
from llmtrain.model.decoder import Decoder
from llmtrain.parallel.plan import compile_blocks

WORKER = Path(__file__).with_name("build_worker.py")
POLICY = {"num_layers": 3, "tied": True}
CRITIC = {
    **{"num_layers": 2, "tied": False, "lr": 3e-3, "grad_clip": 5.0, "loss": "squared"},
    "model": {"hidden_size": 48, "ffn_size": 64},
}
KINDS = {"fsdp": {"backend": "fsdp"}, **{f"z{n}": {"backend": "deepspeed", "zero_stage": n} for n in range(4)}}
MOE = {"moe": {"num_experts": 4, "top_k": 2, "expert_ffn_size": 24, "balance": "bias", "selection_bias": True}}


def job(mesh: dict, one: str, two: str, **policy: object) -> dict[str, dict]:
    return {"a": {**POLICY, **mesh, **KINDS[one], **policy}, "b": {**CRITIC, **mesh, **KINDS[two]}}


def deep(job: dict[str, dict]) -> dict[str, dict]:
    """The same with a layer for each of four stages."""
    return {name: {**layout, "num_layers": 4} for name, layout in job.items()}


TWO_RANKS = [
    job({"dp_shard": 2}, "z1", "z3"),
    job({"dp_replicate": 2}, "z0", "z0"),
    job({"pp": 2}, "z3", "z2"),
    job({"tp": 2}, "fsdp", "z1"),
]
EVERY_PAIR = [
    job(mesh, *kinds)
    for mesh in ({"dp_shard": 2}, {"tp": 2}, {"pp": 2}, {"cp": 2, "context": "ring"})
    for kinds in itertools.product(("z1", "z2", "z3", "fsdp"), repeat=2)
]
FEATURES = [
    job({"dp_shard": 2}, "z2", "z2", precision="bf16"),
    job({"dp_shard": 2}, "z3", "z1", precision="bf16"),
    job({"dp_shard": 2}, "z2", "z2", offload="optimizer"),
    job({"dp_shard": 2}, "z3", "z3", offload="params"),
    job({"dp_shard": 2}, "z2", "z2", optimizer="muon"),
    job({"dp_shard": 2}, "z3", "z2", model={"lora": {"rank": 2}}),
    *(job({"dp_shard": 2, "ep": 2}, one, two, **MOE) for one, two in (("z1", "z3"), ("z3", "z2"), ("z2", "fsdp"))),
    *({"a": {**POLICY, "tp": 2, **KINDS[one]}, "b": {**CRITIC, "dp_shard": 2, **KINDS["z1"]}} for one in ("z1", "z3")),
]
FOUR_RANKS = [
    job({"tp": 2, "dp_shard": 2}, "z2", "z3"),
    job({"pp": 2, "dp_shard": 2}, "z3", "z1"),
    job({"pp": 2, "tp": 2}, "z1", "fsdp"),
    job({"cp": 2, "dp_shard": 2, "context": "ring"}, "fsdp", "z2"),
    job({"dp_replicate": 2, "dp_shard": 2}, "fsdp", "fsdp"),
    job({"dp_replicate": 2, "tp": 2}, "z0", "z0"),
    deep(job({"pp": 2, "dp_shard": 2, "schedule": "zbv", "virtual_stages": 2, "reshard": False}, "z1", "fsdp")),
]


def digests(forked: Callable, ranks: int, jobs: list[dict], living: str) -> list[list[dict]]:
    result = forked(ranks, WORKER, json.dumps(jobs), living, timeout_s=280)
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"job"')]
    assert len(lines) == len(jobs), result.stdout[-3000:]
    return [line["ranks"] for line in lines]


def check(forked: Callable, ranks: int, jobs: list[dict]) -> None:
    alone = zip(*(digests(forked, ranks, jobs, name) for name in "ab"), strict=True)
    both = digests(forked, ranks, jobs, "a+b")
    for each, (a, b), together in zip(jobs, alone, both, strict=True):
        assert together == [{**x, **y} for x, y in zip(a, b, strict=True)], each


def test_two_engines_are_each_as_alone(forked: Callable) -> None:
    check(forked, 2, TWO_RANKS)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("ranks", "jobs"), [(2, EVERY_PAIR), (2, FEATURES), (4, FOUR_RANKS)])
def test_every_kind_of_two_engines(forked: Callable, ranks: int, jobs: list[dict]) -> None:
    for first in range(0, len(jobs), 8):
        check(forked, ranks, jobs[first : first + 8])


def test_stage_0_refuses_a_second_mesh(forked: Callable) -> None:
    job = {"a": {**POLICY, "tp": 2, **KINDS["z0"]}, "b": {**CRITIC, "dp_shard": 2, **KINDS["z1"]}}
    ((one, two),) = digests(forked, 2, [job], "a+b")
    assert one == two and "engine.zero_stage=0" in one["error"] and "one mesh" in one["error"]


def test_many_compiled_models_are_all_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced alone (`eager`); torch says nothing when it gives up, unless it is told to."""
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))
    # torch's own way to put settings back: pytest's would delete what the module computes
    with dynamo.patch(recompile_limit=dynamo.recompile_limit, fail_on_recompile_limit_hit=True):
        compile_five_models()


def compile_five_models() -> None:
    for width in range(16, 96, 16):
        shape = {
            "num_layers": 1,
            "hidden_size": width,
            "ffn_size": 32,
            "num_heads": 2,
            "num_kv_heads": 2,
            "vocab_size": 32,
        }
        model = Decoder(resolve_model(ModelConfig(**shape)))
        compile_blocks([model])
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients):
                model(torch.zeros(1, 4, dtype=torch.int64), torch.arange(4)[None])


def test_a_trained_role_has_an_optimizer() -> None:
    role = Role("critic", ModelConfig(), ParallelConfig(), EngineConfig(), lambda name: torch.zeros(1))
    with pytest.raises(AssertionError, match="critic"):
        build_trained(role, SimpleNamespace())
