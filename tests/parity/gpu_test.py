"""On one GPU against one plain process on the CPU: what is computed by other kernels there. Needs a CUDA device:

python -m pytest -m gpu
"""

from __future__ import annotations

import pytest

from tests.conftest import Torchrun
from tests.parity.layouts_test import EXACT, ROUNDING, check

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

MOE = {"num_experts": 4, "top_k": 2, "expert_ffn_size": 32, "balance": "none"}
ALL_CHOSEN = {**MOE, "top_k": 4}  # rounding would choose other experts
MLA = {"q_rank": 16, "kv_rank": 16, "nope_head_dim": 8, "rope_head_dim": 8, "v_head_dim": 8}
LATENT = {"attention": "mla", "num_kv_heads": 4, "mla": MLA}
FULL_PRECISION = [
    {"zero_stage": 0},
    {"zero_stage": 1, "grad_clip": 0},
    {"zero_stage": 2},
    {"zero_stage": 3},
    {"backend": "fsdp"},
    {"backend": "fsdp", "remat": "selective"},
    {"zero_stage": 2, "offload": "optimizer"},
    {"zero_stage": 3, "offload": "params", "remat": "full"},
    {"backend": "fsdp", "offload": "params"},
    {"zero_stage": 1, "model": {"sliding_window": 6}},
    {"zero_stage": 1, "attention": "flex", "model": {"head_dim": 16}},
    {"zero_stage": 1, "moe": MOE, "remat": "selective"},
    {"backend": "fsdp", "moe": MOE},
    {"zero_stage": 1, "model": LATENT},
]
COMPILED = [{"zero_stage": 1, "compile": True}, {"backend": "fsdp", "compile": True, "remat": "selective"}]
# orthogonalises in bf16 there: its updates, and what follows from them, are off by about 2^-9
MUON = [{"zero_stage": 1, "optimizer": "muon"}, {"backend": "fsdp", "optimizer": "muon", "remat": "selective"}]
MUON_ROUNDING = {"loss": 1e-4, "norm": 1e-3, "grad": 1e-2, "weight": 5e-3, "score": 5e-3}
SIXTEEN_BITS = [
    {"zero_stage": 1, "precision": "bf16"},
    {"zero_stage": 3, "precision": "bf16"},
    {"backend": "fsdp", "precision": "bf16"},
    {"zero_stage": 1, "precision": "bf16", "compile": True},
    {"zero_stage": 1, "precision": "bf16", "optimizer": "muon"},
    {"zero_stage": 1, "precision": "fp16"},
    {"zero_stage": 3, "precision": "fp16"},
    {"backend": "fsdp", "precision": "fp16"},
    {"zero_stage": 1, "precision": "bf16", "moe": ALL_CHOSEN},
    {"backend": "fsdp", "precision": "bf16", "moe": ALL_CHOSEN, "remat": "selective"},
]
EIGHT_BITS = [
    {"zero_stage": 1, "precision": "fp8"},
    {"zero_stage": 3, "precision": "fp8"},
    {"backend": "fsdp", "precision": "fp8"},
    {"zero_stage": 1, "precision": "fp8", "compile": True},
]
# e4m3 keeps three bits of mantissa, e5m2 two: each product is off by about 2^-4. Seen on an H200: loss 2e-3, norm
# 2.5e-2, gradient 0.27, weight 2.5e-2, log-prob 0.12.
EIGHT_BIT_ROUNDING = {"loss": 5e-3, "norm": 5e-2, "grad": 0.4, "weight": 4e-2, "score": 0.2}


def test_full_precision(torchrun: Torchrun) -> None:
    """torch multiplies fp32 in fp32 there too, unless it is told to use TF32."""
    check(torchrun, 1, FULL_PRECISION, timeout_s=300, tolerances=EXACT)


def test_muon(torchrun: Torchrun) -> None:
    check(torchrun, 1, MUON, timeout_s=300, tolerances=MUON_ROUNDING)


def test_compiled(torchrun: Torchrun) -> None:
    check(torchrun, 1, COMPILED, timeout_s=300, tolerances=EXACT)


def test_sixteen_bits_differ_by_rounding_alone(torchrun: Torchrun) -> None:
    check(torchrun, 1, SIXTEEN_BITS, timeout_s=300, tolerances=ROUNDING)


def test_eight_bits_differ_by_rounding_alone(torchrun: Torchrun) -> None:
    check(torchrun, 1, EIGHT_BITS, timeout_s=300, tolerances=EIGHT_BIT_ROUNDING)
