from __future__ import annotations

import pytest

from llmtrain.arch.pipeline import plan_stages
from llmtrain.config.schema import ModelConfig, ParallelConfig

SMALL_HEAD = {"hidden_size": 64, "ffn_size": 192, "vocab_size": 64}


@pytest.mark.parametrize(("pp", "virtual", "schedule"), [(3, 1, "1f1b"), (2, 2, "interleaved_1f1b"), (2, 2, "zbv")])
def test_stages_cover_every_layer_and_every_rank(pp: int, virtual: int, schedule: str) -> None:
    for layers in range(pp * virtual, 13):
        parallel = ParallelConfig(pp=pp, virtual_stages=virtual, schedule=schedule)
        plan = plan_stages(ModelConfig(num_layers=layers, **SMALL_HEAD), parallel)
        assert [i for stage in plan.layers for i in stage] == list(range(layers))
        assert sorted(s for rank in range(pp) for s in plan.stages_of(rank)) == list(range(pp * virtual))


def test_more_stages_than_layers() -> None:
    with pytest.raises(ValueError, match=r"must be at most model\.num_layers=2"):
        plan_stages(ModelConfig(num_layers=2), ParallelConfig(pp=3))


def test_stage_layers_must_add_up() -> None:
    model = ModelConfig(num_layers=5)
    assert plan_stages(model, ParallelConfig(pp=2, stage_layers=[1, 4])).layers == (range(0, 1), range(1, 5))
    for counts in ([5, 0], [2, 2], [1, 2, 2]):
        with pytest.raises(ValueError, match="must be 2 positive numbers"):
            plan_stages(model, ParallelConfig(pp=2, stage_layers=counts))


def test_the_head_counts_as_layers() -> None:
    """A layer here has 4 x 64^2 + 3 x 64 x 192 = 53,248 weights; a head of 3,328 x 64 is as much as 4 of them."""
    parallel = ParallelConfig(pp=2)
    assert [len(r) for r in plan_stages(ModelConfig(num_layers=8, **SMALL_HEAD), parallel).layers] == [4, 4]
    large = ModelConfig(num_layers=8, **(SMALL_HEAD | {"vocab_size": 3328}))
    assert [len(r) for r in plan_stages(large, parallel).layers] == [6, 2]


def test_owner_of_a_parameter() -> None:
    plan = plan_stages(ModelConfig(num_layers=5, **SMALL_HEAD), ParallelConfig(pp=2))
    assert plan.owner("embed.weight") == 0
    assert [plan.owner(f"layers.{i}.attention.q.weight") for i in range(5)] == [0, 0, 0, 1, 1]
    assert plan.owner("norm.weight") == plan.owner("head.weight") == 1


def test_zbv_puts_the_head_beside_the_embedding() -> None:
    parallel = ParallelConfig(pp=2, virtual_stages=2, schedule="zbv")
    plan = plan_stages(ModelConfig(num_layers=4, **SMALL_HEAD), parallel)
    assert [plan.stages_of(rank) for rank in range(2)] == [[0, 3], [1, 2]]
    assert plan.owner("head.weight") == plan.owner("embed.weight") == 0
