"""Every schedule against one plain process: loss, every gradient, norm, weights and scores."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.parity.layouts_test import check

INTERLEAVED = {"virtual_stages": 2, "schedule": "interleaved_1f1b"}
ZERO_BUBBLE = {"virtual_stages": 2, "schedule": "interleaved_zero_bubble"}
ZBV = {"virtual_stages": 2, "schedule": "zbv"}

TWO = [
    {"pp": 2, **INTERLEAVED, "zero_stage": 3, "remat": "full"},
    {"pp": 2, **ZERO_BUBBLE, "zero_stage": 1, "tied": False},
    {"pp": 2, **ZBV, "zero_stage": 2, "offload": "optimizer"},
    {"pp": 2, **ZBV, "zero_stage": 0, "num_layers": 5, "grad_clip": 0},
]
FOUR = [
    {"pp": 2, "tp": 2, **INTERLEAVED, "zero_stage": 2, "remat": "selective", "sequence_parallel": False},
    {"pp": 2, "tp": 2, **ZERO_BUBBLE, "zero_stage": 0, "sequence_parallel": False, "tied": False},
    {"pp": 2, "tp": 2, **ZBV, "zero_stage": 1},
    {"pp": 2, "dp_shard": 2, **INTERLEAVED, "backend": "fsdp"},
    {"pp": 4, "virtual_stages": 3, "schedule": "interleaved_1f1b", "zero_stage": 1, "num_layers": 13},
    {"pp": 4, "stage_layers": [1, 3, 1, 2], "zero_stage": 1, "num_layers": 7},
]


def every(pp: int) -> list[dict]:
    """Each schedule on all ZeRO stages it can be used with, tied and not, one layer more than divides."""
    return [
        {"pp": pp, **schedule, "zero_stage": stage, "tied": tied, "num_layers": 2 * pp + 1}
        for schedule, stages in ((INTERLEAVED, 4), (ZERO_BUBBLE, 3), (ZBV, 3))
        for stage in range(stages)
        for tied in (True, False)
    ]


def test_two_ranks(forked: Callable) -> None:
    check(forked, 2, TWO, timeout_s=150)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_four_ranks(forked: Callable) -> None:
    check(forked, 4, FOUR, timeout_s=800)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("pp", [2, 4])
def test_every_schedule_and_stage(forked: Callable, pp: int) -> None:
    check(forked, pp, every(pp), timeout_s=800)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled(forked: Callable) -> None:
    layouts = [{"pp": 2, **INTERLEAVED, "zero_stage": 1, "compile": True, "remat": "selective"}]
    check(forked, 2, layouts, timeout_s=800)
