"""Tells how long a message takes, by which links the ranks of its group are joined."""

from __future__ import annotations

import math

from llmtrain.arch.mesh import AXES
from llmtrain.config.plan import HardwareConfig
from llmtrain.config.schema import ParallelConfig
from llmtrain.scaling.communication import GROUPS, Item, RankStep

LINK = 0.8  # share of a link's bandwidth that large messages reach: NCCL's all-reduce on 8 H100 moves about 360 GB/s


def stride_of(group: str, parallel: ParallelConfig) -> int:
    """Returns the distance between neighbours of a group, in ranks. tp is innermost, pp outermost; the ranks of ep lie
    within dp_shard x cp, those that hold the same experts ep apart."""
    if group == "ep":
        return parallel.tp
    inner = GROUPS[group][-1] if GROUPS[group] else "tp"
    stride = math.prod(getattr(parallel, axis) for axis in AXES[AXES.index(inner) + 1 :])
    return stride * (parallel.ep if group.startswith("expert_") else 1)


def in_node(group: str, rank: RankStep, hardware: HardwareConfig) -> int:
    """Returns how many ranks of a group share a node."""
    return min(rank.ranks(group), max(1, hardware.gpus_per_node // stride_of(group, rank.parallel)))


def bandwidths(hardware: HardwareConfig, within: bool = True, between: bool = True) -> tuple[float, float]:
    """Returns the bytes a second that messages reach in a node and between nodes; 0 for what is not asked for.

    Raises ValueError for what is asked for and not known.
    """
    found = []
    for key, asked in (("node_gb_per_s", within), ("network_gb_per_s", between)):
        value = getattr(hardware, key) if asked else 0.0
        if value is None:
            raise ValueError(f"plan.hardware: {hardware.name} has no {key}, over which ranks send; add it to the file")
        found.append(value * 1e9 * LINK)
    return found[0], found[1]


def link_seconds(item: Item, rank: RankStep, hardware: HardwareConfig) -> float:
    """Returns the seconds of the messages of an item on the links of a rank.

    A ring moves 1 - 1 / n of an all-gather or reduce-scatter, of an all-reduce twice that, and all of a broadcast.
    Where a group spans nodes, all its ranks in a node send to the next one side by side, each over its own link. In an
    all-to-all only what is for other nodes takes the network, and a send takes one link.
    """
    ranks, near = rank.ranks(item.axis), in_node(item.axis, rank, hardware)
    node, network = bandwidths(hardware, near > 1, near < ranks)
    if item.kind == "send":  # of a ring in a node, its slowest link; of pipeline ranks, the one to the next
        return item.size_bytes / (node if near == ranks else network)
    if item.kind == "all_to_all":
        away = (ranks - near) / ranks
        outside = away / network if away else 0.0
        return item.size_bytes * max(outside, (1 - 1 / ranks - away) / node if near > 1 else 0.0)
    times = {"all_reduce": 2 * (1 - 1 / ranks), "broadcast": 1.0}.get(item.kind, 1 - 1 / ranks)
    return times * item.size_bytes / ring_bandwidth(node, network, near, near == ranks)


def ring_bandwidth(node: float, network: float, near: int, one_node: bool) -> float:
    """Returns the bytes a second of a ring with `near` ranks in each of its nodes: between nodes they have as many
    links side by side."""
    if one_node:
        return node
    return network if near == 1 else min(node, near * network)
