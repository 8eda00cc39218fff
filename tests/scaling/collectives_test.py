"""The simulator of collectives against closed forms, exactly, and against sums by hand where links are not equal."""

from __future__ import annotations

import time

import numpy as np
import pytest

from llmtrain.arch.hardware import HARDWARE
from llmtrain.scaling.collectives import (
    NETWORK_LATENCY_S,
    NODE_LATENCY_S,
    hierarchical_seconds,
    ring_over_nodes,
    ring_seconds,
    tree_seconds,
)
from llmtrain.scaling.links import LINK

H100 = HARDWARE["h100"]


@pytest.mark.parametrize("n", [1, 2, 8, 100])
def test_a_ring_of_equal_links_is_the_closed_form(n: int) -> None:
    found = ring_seconds(1e9, np.full(n, 1e-9), np.full(n, 1e-3), np.zeros(n))
    assert found == pytest.approx(2 * (n - 1) / n + 2 * (n - 1) * 1e-3)


def test_a_slow_link_or_a_late_rank_holds_up_the_ring() -> None:
    slow = np.full(8, 1e-9)
    slow[3] = 4e-9
    assert ring_seconds(8e9, slow, np.zeros(8), np.zeros(8)) == pytest.approx(14 * 4)
    late = np.zeros(8)
    late[5] = 7.0
    assert ring_seconds(8e9, np.full(8, 1e-9), np.zeros(8), late) == pytest.approx(7 + 14)


def test_nodes_send_side_by_side() -> None:
    """One ring over 16 nodes has one link to the next node, eight rings have eight."""
    size = 8e9
    one, eight = (f(size, 128, H100, 8) for f in (ring_over_nodes, hierarchical_seconds))
    assert one == pytest.approx(2 * 127 / 128 * size / (50e9 * LINK) + 254 * NETWORK_LATENCY_S, rel=1e-3)
    inside = 2 * 7 / 8 * size / (450e9 * LINK) + 14 * NODE_LATENCY_S
    between = 2 * 15 / 16 * size / 8 / (50e9 * LINK) + 30 * NETWORK_LATENCY_S
    assert eight == pytest.approx(inside + between, rel=1e-9) and one > 4 * eight


def test_small_messages_go_by_tree_and_large_ones_by_ring() -> None:
    nodes = 2048
    small, large = 1e5, 8e9
    assert tree_seconds(small, 8 * nodes, H100, 8) < hierarchical_seconds(small, 8 * nodes, H100, 8)
    assert tree_seconds(large, 8 * nodes, H100, 8) > hierarchical_seconds(large, 8 * nodes, H100, 8)


@pytest.mark.slow
def test_a_ring_of_sixteen_thousand_takes_seconds() -> None:
    began = time.process_time()
    found = ring_over_nodes(1e9, 16_384, H100, 8)
    assert found == pytest.approx(2e9 / (50e9 * LINK) + 2 * 16_383 * NETWORK_LATENCY_S, rel=0.01)
    assert time.process_time() - began < 10
