"""A job of a policy, a critic and a frozen reference on any mesh, in any engines, against one plain process: loss,
every gradient, norm, weights, scores."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("jobs_worker.py")
PAIRS = Path(__file__).with_name("pairs_worker.py")  # DPO against a frozen reference, and a reward model
TOLERANCE = 1e-5  # fp32 rounding: sums run in another order than in one process
Z0, Z1, Z2, Z3 = ({"zero_stage": stage} for stage in range(4))
FSDP = {"backend": "fsdp"}
FOUR_STAGES = {"virtual_stages": 2, "num_layers": 4}
RING = {"cp": 2, "context": "ring"}


def case(mesh: dict, policy: dict, critic: dict) -> dict:
    return {"mesh": mesh, "policy": policy, "critic": critic}


TWO_RANKS = [
    case({"dp_replicate": 2}, Z0, Z0),
    case({"tp": 2}, Z2, FSDP),
]
FOUR_RANKS = [case({"pp": 2, "dp_shard": 2}, Z1, Z3), case({"tp": 2, **RING}, FSDP, Z2)]  # every axis, every engine
KINDS = [(Z1, Z1), (Z2, Z3), (Z3, FSDP), (FSDP, Z2)]
FOUR_PAIRS = [case({"tp": 2, **RING}, Z1, FSDP), case({"pp": 2, "dp_shard": 2}, FSDP, Z2)]
MORE_ON_TWO = [
    *TWO_RANKS,
    *(
        case(mesh, *kinds)
        for mesh in ({"dp_shard": 2}, {"tp": 2}, {"tp": 2, "sequence_parallel": False}, {"pp": 2}, RING)
        for kinds in KINDS
    ),
]
MORE_ON_FOUR = [
    *FOUR_RANKS,
    *FOUR_PAIRS,
    case({"tp": 2, **RING}, FSDP, Z1),
    case({"tp": 2, "pp": 2}, Z3, Z2),
    case({"tp": 2, "dp_shard": 2}, Z3, Z1),
    case({"dp_replicate": 2, "dp_shard": 2}, FSDP, FSDP),
    case({"dp_replicate": 2, "tp": 2}, Z0, Z0),
    case({"dp_shard": 2, **RING}, Z2, FSDP),
    case({"pp": 2, **RING}, FSDP, Z1),
    case({"pp": 2, "dp_shard": 2, "schedule": "interleaved_1f1b", **FOUR_STAGES}, Z1, FSDP),
    case({"pp": 2, "tp": 2, "schedule": "zbv", "reshard": False, **FOUR_STAGES}, FSDP, Z2),
    case({"cp": 2, "tp": 2, "context": "alltoall"}, Z1, Z3),
    case({"cp": 2, "dp_shard": 2, "context": "allgather"}, Z3, Z3),
    case({"tp": 4}, Z1, FSDP),
    case({"dp_shard": 4}, Z3, Z3),
]


def quick(cases: list[dict]) -> list[dict]:
    """The same with three steps: behind the first the models differ, behind the second the moments do."""
    return [{**each, "steps": 3} for each in cases]


def check(run: Callable, ranks: int, cases: list[dict], timeout_s: float, worker: Path = WORKER) -> None:
    result = run(ranks, worker, json.dumps(cases), timeout_s=timeout_s)
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"case"')]
    failed = [line for line in lines if "error" in line]
    assert not failed, failed
    assert len(lines) == len(cases), result.stdout[-3000:]
    for line in lines:
        print(line)
        assert max(line["scores"].values()) <= TOLERANCE, line
        for role in ("policy", "critic"):
            assert max(line[role][measure] for measure in ("loss", "norm", "grad", "weight")) <= TOLERANCE, line


@pytest.mark.parametrize(("ranks", "cases"), [(2, TWO_RANKS), (4, FOUR_RANKS)])
def test_three_models_in_one_job(forked: Callable, ranks: int, cases: list[dict]) -> None:
    check(forked, ranks, quick(cases), timeout_s=120)


def test_preference_pairs_against_a_frozen_reference(forked: Callable) -> None:
    check(forked, 4, quick(FOUR_PAIRS), timeout_s=120, worker=PAIRS)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("ranks", "cases"), [(2, MORE_ON_TWO), (4, MORE_ON_FOUR)])
@pytest.mark.parametrize("worker", [WORKER, PAIRS], ids=["actor", "pairs"])
def test_many_jobs(forked: Callable, ranks: int, cases: list[dict], worker: Path) -> None:
    for first in range(0, len(cases), 10):
        check(forked, ranks, cases[first : first + 10], timeout_s=400, worker=worker)
