"""Simulates collectives event by event, where the closed forms of a plan assume equal links.

A ring passes chunks from rank to rank, each link as fast as it is: a slow link or a late rank shows.
"""

from __future__ import annotations

import math

import numpy as np

from llmtrain.config.plan import HardwareConfig
from llmtrain.scaling.links import bandwidths

NODE_LATENCY_S, NETWORK_LATENCY_S = 3e-6, 15e-6  # of one message, within a node and between nodes; by assumption


def ring_seconds(size_bytes: float, link_s_per_byte: np.ndarray, latency_s: np.ndarray, late_s: np.ndarray) -> float:
    """Returns the time of a ring all-reduce, step by step: 2 (n - 1) sends of 1 / n of the message from each rank to
    the next. The arrays, [n], are of the link behind each rank and of when the rank starts."""
    n = len(link_s_per_byte)
    if n == 1:
        return float(late_s[0])
    each = size_bytes / n * link_s_per_byte + latency_s
    ready = late_s.astype(np.float64)
    for _ in range(2 * (n - 1)):
        sent = ready + each  # when what a rank sends is with the next one
        ready = np.maximum(np.roll(sent, 1), sent)
    return float(ready.max())


def ring_over_nodes(size_bytes: float, ranks: int, hardware: HardwareConfig, near: int) -> float:
    """Returns the time of one ring over nodes of `near` ranks: every near-th link is the network."""
    network = np.arange(ranks) % near == near - 1 if ranks > near else np.zeros(ranks, dtype=bool)
    inside, outside = bandwidths(hardware, True, ranks > near)
    rates = np.where(network, outside, inside)
    return ring_seconds(size_bytes, 1 / rates, np.where(network, NETWORK_LATENCY_S, NODE_LATENCY_S), np.zeros(ranks))


def hierarchical_seconds(size_bytes: float, ranks: int, hardware: HardwareConfig, near: int) -> float:
    """Returns the time of an all-reduce in three parts: a reduce-scatter in each node, rings between nodes side by
    side, an all-gather in each node."""
    if ranks <= near:
        return ring_over_nodes(size_bytes, ranks, hardware, near)
    nodes = ranks // near
    network = np.full(nodes, 1 / bandwidths(hardware)[1])
    between = ring_seconds(size_bytes / near, network, np.full(nodes, NETWORK_LATENCY_S), np.zeros(nodes))
    return ring_over_nodes(size_bytes, near, hardware, near) + between


def tree_seconds(size_bytes: float, ranks: int, hardware: HardwareConfig, near: int, chunks: int = 64) -> float:
    """Returns the time of an all-reduce up a binary tree of nodes and down again, in chunks that follow each other. In
    a node the ranks form a chain."""
    nodes = math.ceil(ranks / near)
    inside, outside = bandwidths(hardware)
    network = size_bytes / chunks / outside + NETWORK_LATENCY_S
    node = size_bytes / chunks / inside + NODE_LATENCY_S
    hops = [node] * (min(near, ranks) - 1) + [network] * math.ceil(math.log2(nodes))
    return 2 * (sum(hops) + (chunks - 1) * max(hops, default=0.0))
