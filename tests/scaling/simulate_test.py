"""The simulator of pipelines against closed forms, exactly, and against sums by hand where stages are not equal."""

from __future__ import annotations

import pytest

from llmtrain.arch.pipeline import StagePlan
from llmtrain.arch.resolve import resolve_model
from llmtrain.config.schema import EngineConfig, ModelConfig, ParallelConfig
from llmtrain.scaling import simulate
from llmtrain.scaling.plan import bubble_share
from llmtrain.scaling.simulate import (
    forward_bubble,
    interleaved_order,
    pipeline_seconds,
    plain_order,
    simulated_bubble,
)
from llmtrain.scaling.work import Work, work_of


def cut(pp: int, v: int = 1) -> StagePlan:
    layers = tuple(range(stage, stage + 1) for stage in range(pp * v))
    return StagePlan(layers, pp, "1f1b" if v == 1 else "interleaved_1f1b")


@pytest.mark.parametrize(
    ("pp", "v", "m"),
    [(1, 1, 3), (2, 1, 2), (4, 1, 8), (16, 1, 32), (2, 2, 4), (4, 2, 8), (4, 3, 4), (16, 7, 32), (4, 2, 10)],
)
def test_the_bubble_is_the_closed_form(pp: int, v: int, m: int) -> None:
    """(P - 1) / (v m) of the ideal time, and so (P - 1) / (m + P - 1) of all the time without interleaving."""
    found = pipeline_seconds(cut(pp, v), m, [1.0] * pp * v, [2.0] * pp * v, 0.0)
    ideal = 3.0 * m * v
    assert found / ideal - 1 == pytest.approx((pp - 1) / (v * m), abs=1e-12)
    assert found / ideal - 1 == pytest.approx(bubble_share(cut(pp, v).schedule, pp, v, m), abs=1e-12)
    if v == 1:
        assert 1 - ideal / found == pytest.approx((pp - 1) / (m + pp - 1), abs=1e-12)


def test_each_rank_does_everything_once() -> None:
    for orders in ([plain_order(r, 4, 8) for r in range(4)], [interleaved_order(r, 4, 3, 8) for r in range(4)]):
        ops = [op for order in orders for op in order]
        assert len(set(ops)) == len(ops) == 2 * 8 * len({op.stage for op in ops})


def test_sends_and_a_slow_stage_by_hand() -> None:
    """Two ranks, one microbatch: forward, send, forward, backward, send, backward."""
    assert pipeline_seconds(cut(2), 1, [1.0, 1.0], [2.0, 2.0], 0.5) == 7.0
    # the slow second stage works without a pause: 1 + 4 x (2 + 4), and the first stage's last backward behind it
    assert pipeline_seconds(cut(2), 4, [1.0, 2.0], [2.0, 4.0], 0.0) == 1 + 4 * 6 + 2


def test_stages_that_are_not_equal() -> None:
    """8 layers on 2 ranks are equal but for the head: (P - 1) / m. Of 3 layers the first rank has two, and waits only
    once, for the second rank's forward and backward but for its own second forward: (1 - 2 / 3) / (4 x 2)."""
    shape = {"num_kv_heads": 4, "vocab_size": 16, "tie_embeddings": False}
    for layers, expected in ((8, 1 / 4), (3, 1 / 24)):
        model = resolve_model(ModelConfig(num_layers=layers, **shape))
        work = work_of(model, 128, EngineConfig())
        assert simulated_bubble(model, ParallelConfig(pp=2), work, 4) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(("pp", "v", "microbatches"), [(4, 1, 61), (8, 4, 96), (16, 7, 256)])
def test_many_rounds_are_not_played(pp: int, v: int, microbatches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama 3 405B, whose 126 layers do not divide: within half a point of all rounds, of a bubble of up to 8 %."""
    model, schedule = resolve_model(ModelConfig(preset="llama3-405b")), "1f1b" if v == 1 else "interleaved_1f1b"
    layout, work = ParallelConfig(pp=pp, virtual_stages=v, schedule=schedule), work_of(model, 8192, EngineConfig())
    found = simulated_bubble(model, layout, work, microbatches)
    monkeypatch.setattr(simulate, "ROUNDS", 100)
    assert found == pytest.approx(simulated_bubble(model, layout, work, microbatches), abs=0.005)


def test_what_cannot_be_simulated() -> None:
    with pytest.raises(ValueError, match="microbatches=9: must be equal rounds of at least pp=4"):
        pipeline_seconds(cut(4, 2), 9, [1.0] * 8, [2.0] * 8, 0.0)
    with pytest.raises(ValueError, match=r"parallel.schedule=zbv: is not simulated"):
        pipeline_seconds(StagePlan((range(1), range(1, 2)), 1, "zbv"), 2, [1.0] * 2, [2.0] * 2, 0.0)


def test_scoring_only_fills_the_pipeline() -> None:
    """By hand: equal stages idle for (p - 1) / m; of 10 and 2 layers the second waits for the last microbatch alone."""
    model = resolve_model(ModelConfig(num_layers=12, vocab_size=16))
    work = Work(blocks=1.0, attention=0.0, head=0.0, lora=False, remat="none")
    for layers, microbatches, idle in (([6, 6], 4, 1 / 4), ([10, 2], 4, 2 / 40), ([3, 3, 3, 3], 100, 3 / 100)):
        parallel = ParallelConfig(pp=len(layers), stage_layers=layers)
        assert forward_bubble(model, parallel, work, microbatches) == pytest.approx(idle)
    zbv = ParallelConfig(pp=2, schedule="zbv", virtual_stages=2, stage_layers=[3, 3, 3, 3])
    assert forward_bubble(model, zbv, work, 4) == pytest.approx(2 / 8)  # 8 stages a rank, one to fill and one to empty
