"""Seconds of messages by hand: nodes of 8 GPUs, 100 GB/s within, 10 GB/s between, of which LINK is reached."""

from __future__ import annotations

import pytest

from llmtrain.arch.resolve import resolve_model
from llmtrain.config.plan import HardwareConfig
from llmtrain.config.schema import EngineConfig, ModelConfig, MoeConfig, ParallelConfig
from llmtrain.scaling.communication import Item, RankStep, Step
from llmtrain.scaling.links import LINK, in_node, link_seconds

HARDWARE = HardwareConfig(
    name="by hand",
    bf16_tflops=100,
    memory_gb=10,
    memory_gb_per_s=1000,
    node_gb_per_s=100 / LINK,
    network_gb_per_s=10 / LINK,
    watts=1,
)
GB = 10**9


def rank(**axes: int) -> RankStep:
    model = resolve_model(ModelConfig(moe=MoeConfig(num_experts=8, balance="aux")))
    return RankStep(model, ParallelConfig(**{"dp_shard": 1, **axes}), EngineConfig(), Step(1, 1, 128, 128))


@pytest.mark.parametrize(
    ("axis", "kind", "axes", "seconds"),
    [
        ("tp", "all_gather", {"tp": 8}, 8 / 100 * 7 / 8),
        ("tp", "all_reduce", {"tp": 8}, 2 * 8 / 100 * 7 / 8),
        ("tp", "all_gather", {"tp": 16}, 8 / 80 * 15 / 16),  # 8 links side by side between two nodes
        ("grad", "reduce_scatter", {"tp": 8, "dp_shard": 4}, 8 / 10 * 3 / 4),  # one rank of the group a node
        ("grad", "reduce_scatter", {"tp": 2, "dp_shard": 16}, 8 / 40 * 15 / 16),  # four
        ("grad", "all_reduce", {"dp_shard": 8}, 2 * 8 / 100 * 7 / 8),
        ("dp_replicate", "all_reduce", {"dp_shard": 8, "dp_replicate": 2}, 2 * 8 / 10 / 2),
        ("pp", "send", {"pp": 2, "tp": 8}, 8 / 10),
        ("pp", "send", {"pp": 2, "tp": 4}, 8 / 100),
        ("ep", "all_to_all", {"dp_shard": 8, "ep": 8}, 8 * 7 / 8 / 100),
        ("ep", "all_to_all", {"dp_shard": 16, "ep": 16}, 8 * 1 / 2 / 10),  # half of the rows leave the node
        ("expert_grad", "all_reduce", {"dp_shard": 16, "ep": 8}, 2 * 8 / 10 / 2),
    ],
)
def test_seconds(axis: str, kind: str, axes: dict[str, int], seconds: float) -> None:
    assert link_seconds(Item(axis, kind, "x", 8 * GB), rank(**axes), HARDWARE) == pytest.approx(seconds)


def test_tp_is_innermost_and_pp_outermost() -> None:
    many = rank(pp=2, dp_shard=4, cp=2, tp=4)
    assert [in_node(axis, many, HARDWARE) for axis in ("tp", "cp", "dp_shard", "pp")] == [4, 2, 1, 1]
