"""Mixtures of experts on every axis, with both engines, against one plain process: router, balance and biases too."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.parity.layouts_test import ROUNDING, check, check_all

MOE = {"num_experts": 8, "top_k": 2, "expert_ffn_size": 16, "dense_layers": [0]}
SOFTMAX = {"moe": MOE | {"balance": "aux", "aux_coef": 0.3, "z_coef": 0.1}}
SIGMOID = {
    "moe": MOE
    | {"gate": "sigmoid", "selection_bias": True, "balance": "bias+aux", "bias_rate": 0.02, "aux_coef": 0.05}
    | {"num_groups": 4, "top_groups": 2, "scale": 1.5, "shared_ffn_size": 16}
}

TWO = [
    {"dp_shard": 2, "ep": 2, "zero_stage": 1, "model": SOFTMAX},
    {"dp_shard": 2, "ep": 2, "zero_stage": 0, "model": SIGMOID},
    {"dp_shard": 2, "ep": 2, "zero_stage": 3, "model": SIGMOID},
    {"dp_shard": 2, "ep": 2, "backend": "fsdp", "remat": "full", "model": SOFTMAX},
    {"dp_shard": 2, "backend": "fsdp", "model": SIGMOID},
    {"tp": 2, "zero_stage": 2, "model": SIGMOID},
    {"tp": 2, "backend": "fsdp", "sequence_parallel": False, "model": SOFTMAX},
    {"cp": 2, "ep": 2, "zero_stage": 2, "context": "alltoall", "model": SOFTMAX},
    {"dp_shard": 2, "ep": 2, "zero_stage": 1, "optimizer": "muon", "model": SOFTMAX},
    {"dp_shard": 2, "ep": 2, "zero_stage": 0, "optimizer": "muon", "model": SIGMOID},
    {"dp_shard": 2, "ep": 2, "backend": "fsdp", "optimizer": "muon", "model": SOFTMAX},
    {"dp_shard": 2, "zero_stage": 2, "optimizer": "muon", "model": SOFTMAX},
    {"tp": 2, "backend": "fsdp", "optimizer": "muon", "model": SIGMOID},
]
FOUR = [
    {"dp_shard": 2, "tp": 2, "ep": 2, "zero_stage": 1, "model": SOFTMAX},
    {"dp_shard": 2, "tp": 2, "ep": 2, "backend": "fsdp", "model": SIGMOID},
    {"pp": 2, "dp_shard": 2, "ep": 2, "zero_stage": 1, "model": SIGMOID},
    {"pp": 2, "dp_shard": 2, "ep": 2, "backend": "fsdp", "model": SOFTMAX},
    {"dp_shard": 4, "ep": 2, "zero_stage": 2, "offload": "optimizer", "model": SOFTMAX},
    {"dp_replicate": 2, "dp_shard": 2, "ep": 2, "backend": "fsdp", "model": SIGMOID},
    {"dp_shard": 2, "tp": 2, "ep": 2, "zero_stage": 2, "optimizer": "muon", "model": SIGMOID},
    {"dp_replicate": 2, "dp_shard": 2, "ep": 2, "backend": "fsdp", "optimizer": "muon", "model": SIGMOID},
]
EIGHT = [
    {"pp": 2, "dp_shard": 2, "tp": 2, "ep": 2, "zero_stage": 1, "model": SIGMOID},
    {"pp": 2, "dp_shard": 2, "tp": 2, "ep": 2, "backend": "fsdp", "remat": "full", "model": SOFTMAX},
    {"dp_shard": 4, "tp": 2, "ep": 4, "zero_stage": 2, "model": SOFTMAX},
    {"dp_shard": 4, "tp": 2, "ep": 2, "zero_stage": 3, "model": SIGMOID},
    {"dp_shard": 2, "cp": 2, "tp": 2, "ep": 4, "backend": "fsdp", "model": SOFTMAX},
    {"dp_replicate": 2, "dp_shard": 4, "ep": 4, "zero_stage": 0, "model": SIGMOID},
]


def experts(number: int, fields: dict) -> dict:
    """The same model with so many."""
    return {"moe": fields["moe"] | {"num_experts": number}}


UNEVEN = [  # the other numbers of ranks from 2 to 8, each with as many experts as divide over them
    {"dp_shard": 3, "ep": 3, "zero_stage": 1, "model": experts(6, SOFTMAX)},
    {"dp_shard": 5, "ep": 5, "backend": "fsdp", "model": experts(10, SOFTMAX)},
    {"dp_shard": 3, "tp": 2, "ep": 3, "zero_stage": 2, "model": experts(12, SIGMOID)},
    {"pp": 2, "dp_shard": 3, "ep": 3, "backend": "fsdp", "model": experts(12, SIGMOID)},
    {"dp_shard": 7, "ep": 7, "zero_stage": 1, "model": experts(7, SOFTMAX)},
]
COMPILED = [
    {"dp_shard": 2, "ep": 2, "zero_stage": 1, "compile": True, "remat": "full", "model": SOFTMAX},
    {"dp_shard": 2, "ep": 2, "backend": "fsdp", "compile": True, "remat": "full", "model": SIGMOID},
    {"tp": 2, "zero_stage": 1, "compile": True, "remat": "full", "model": SIGMOID},
    {"dp_shard": 2, "ep": 2, "zero_stage": 1, "compile": True, "remat": "selective", "model": SOFTMAX},
]
REPLAYED = [  # with experts that are given, as rollout.router_replay does
    {"task": "replayed", **layout}
    for layout in (
        {"dp_shard": 2, "ep": 2, "zero_stage": 1, "model": SIGMOID},
        {"dp_shard": 2, "ep": 2, "backend": "fsdp", "remat": "full", "model": SOFTMAX},
        {"tp": 2, "zero_stage": 2, "remat": "selective", "model": SIGMOID},
        {"tp": 2, "backend": "fsdp", "sequence_parallel": False, "model": SOFTMAX},
        {"cp": 2, "ep": 2, "zero_stage": 2, "context": "alltoall", "model": SOFTMAX},
        {"cp": 2, "backend": "fsdp", "context": "ring", "model": SIGMOID},
        {"pp": 2, "zero_stage": 1, "model": SIGMOID},
        {"pp": 2, "backend": "fsdp", "schedule": "interleaved_1f1b", "virtual_stages": 2, "model": SOFTMAX},
    )
]
REPLAYED_FOUR = [
    {"task": "replayed", "pp": 2, "dp_shard": 2, "ep": 2, "zero_stage": 1, "model": SIGMOID},
    {"task": "replayed", "dp_shard": 2, "tp": 2, "ep": 2, "backend": "fsdp", "model": SOFTMAX},
]
REPLAYED_COMPILED = [
    {"task": "replayed", **COMPILED[1]},
    {"task": "replayed", **COMPILED[3]},
]
SIXTEEN_BITS = [
    {"dp_shard": 2, "ep": 2, "zero_stage": 1, "precision": "bf16", "model": SOFTMAX},
    {"dp_shard": 2, "ep": 2, "backend": "fsdp", "precision": "bf16", "model": SOFTMAX},
]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_ranks(forked: Callable) -> None:
    check(forked, 2, TWO, timeout_s=500)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_four_ranks(forked: Callable) -> None:
    check(forked, 4, FOUR, timeout_s=500)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_eight_ranks(forked: Callable) -> None:
    check(forked, 8, EIGHT, timeout_s=500)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_three_to_seven_ranks(forked: Callable) -> None:
    check_all(forked, UNEVEN, timeout_s=300)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled(forked: Callable) -> None:
    check(forked, 2, COMPILED, timeout_s=800)


@pytest.mark.slow
def test_sixteen_bits(forked: Callable) -> None:
    """Against fp32, loss and norm alone: where rounding turns a token's choice of an expert, in one process as well,
    the gradient of that expert differs by much."""
    tolerances = {measure: ROUNDING[measure] for measure in ("loss", "norm")}
    check(forked, 2, SIXTEEN_BITS, timeout_s=200, tolerances=tolerances)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_experts_that_are_given(forked: Callable) -> None:
    check(forked, 2, REPLAYED, timeout_s=300)
    check(forked, 4, REPLAYED_FOUR, timeout_s=200)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_experts_that_are_given_compiled(forked: Callable) -> None:
    check(forked, 2, REPLAYED_COMPILED, timeout_s=500)
