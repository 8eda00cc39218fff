"""Updates of PPO, policy, critic and frozen reference, on any mesh and in any engines, against one plain process: loss,
every gradient, norm, weights, scores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.parity import jobs_test
from tests.parity.jobs_test import FSDP, MORE_ON_FOUR, MORE_ON_TWO, RING, Z1, Z2, Z3, case, quick

WORKER = Path(__file__).with_name("ppo_worker.py")
FEW = [case({"pp": 2, "tp": 2}, FSDP, Z2), case({"dp_shard": 2, **RING}, Z3, Z1)]


def check(forked: Callable, ranks: int, cases: list[dict], timeout_s: float) -> None:
    def run(ranks: int, worker: Path, *args: str, timeout_s: float) -> object:
        return forked(ranks, WORKER, *args, timeout_s=timeout_s)

    jobs_test.check(run, ranks, cases, timeout_s)


def test_few_layouts_with_every_axis(forked: Callable) -> None:
    check(forked, 4, quick(FEW), timeout_s=120)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("ranks", "cases"), [(2, MORE_ON_TWO), (4, [*FEW, *MORE_ON_FOUR])])
def test_many_layouts(forked: Callable, ranks: int, cases: list[dict]) -> None:
    for first in range(0, len(cases), 10):
        check(forked, ranks, cases[first : first + 10], timeout_s=400)
