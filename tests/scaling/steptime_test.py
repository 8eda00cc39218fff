"""The time of a step by hand, on hardware with round numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from llmtrain.config.schema import Config, EngineConfig, ModelConfig, ParallelConfig, TrainConfig
from llmtrain.scaling import links, steptime
from llmtrain.scaling.plan import Plan, plan
from llmtrain.scaling.speed import (
    WAIT,
    failure_lines,
    fit_line,
    mfu,
    parts_of,
    run_cost,
    run_seconds,
    speed_lines,
)

MODEL = ModelConfig(preset="llama3-8b")
FILE = """
name: by hand
bf16_tflops: 100
reached_share: 0.5
memory_gb: 50
memory_gb_per_s: 1000
node_gb_per_s: 100
network_gb_per_s: 10
watts: 500
"""


@pytest.fixture
def hardware(tmp_path: Path) -> str:
    (tmp_path / "hardware.yaml").write_text(FILE)
    return str(tmp_path / "hardware.yaml")


def planned(hardware: str, ranks: int, engine: dict | None = None, **axes: object) -> tuple[Config, Plan]:
    train = TrainConfig(steps=1000, seq_len=8192, global_batch_seqs=64)
    config = Config(
        model=MODEL,
        parallel=ParallelConfig(**axes),
        engine=EngineConfig(**(engine or {})),
        train=train,
        plan={"hardware": hardware, "price_per_gpu_hour": 2.0, "reserve_gb": 0.0},
    )
    return config, plan(config, ranks)


def test_products_and_memory_traffic(hardware: str) -> None:
    _, p = planned(hardware, 1, {"remat": "full"})
    tokens = 64 * 8192
    attention = p.work.hardware_attention * steptime.REACHED / steptime.ATTENTION
    flops = p.work.hardware_blocks + p.work.hardware_head + attention
    assert p.time.products_s == pytest.approx(tokens * flops / 50e12)
    block = 4 * 4096 + 2 * 128 * (32 + 8) + 4 * 14336  # values a token
    logits = 128_256 * 4 * steptime.LOGIT_PASSES
    expected = 32 * block * 2 * steptime.PASSES * 4 / 3 + logits
    assert p.time.memory_s == pytest.approx(tokens * expected / 1e12)
    assert p.time.tensor_s == p.time.data_s == p.time.bubble_s == p.time.pipeline_s == 0


def test_tensor_parallelism_divides_the_products_and_adds_messages(hardware: str) -> None:
    (_, one), (_, eight) = planned(hardware, 1), planned(hardware, 8, tp=8)
    assert eight.time.products_s == pytest.approx(one.time.products_s / 8)
    hidden = 64 * 8192 * 4096 * 2  # bytes of a step's hidden states; 2 gathers and 2 reductions a layer, twice
    least = 8 * 32 * hidden * 7 / 8 / (100e9 * links.LINK)
    assert least < eight.time.tensor_s < 1.05 * least  # and those of embedding and head


def test_the_bubble_and_the_hidden_reduction(hardware: str) -> None:
    _, p = planned(hardware, 16, pp=2, dp_shard=8)
    busy = p.time.products_s + p.time.memory_s
    assert p.time.bubble_s == pytest.approx(busy * p.bubble)
    assert p.bubble == pytest.approx(1 / 8, abs=0.01)  # 8 microbatches, 2 ranks that are nearly equal
    assert p.time.pipeline_s == pytest.approx(2 * 8192 * 4096 * 2 / (10e9 * links.LINK))
    _, wide = planned(hardware, 16, {"zero_stage": 3}, dp_shard=16)
    assert wide.time.data_s == 0  # gathers hide behind the whole step
    _, late = planned(hardware, 16, {"zero_stage": 1}, dp_shard=16)
    gathered = 8_030_261_248 * 2 * 15 / 16 / (80e9 * links.LINK)  # 8 links of 10 GB/s
    assert late.time.data_s == pytest.approx(gathered, rel=1e-3)


def test_interleaving_makes_the_bubble_shorter(hardware: str) -> None:
    plain, cut = planned(hardware, 4, pp=4), planned(hardware, 4, pp=4, schedule="interleaved_1f1b", virtual_stages=4)
    assert plain[1].time.bubble_s > 2 * cut[1].time.bubble_s > 0  # a quarter with equal stages


def test_what_a_run_costs(hardware: str) -> None:
    config, p = planned(hardware, 8, tp=8)
    hours = 1000 * p.time.total_s / 3600
    assert run_seconds(p) == pytest.approx(hours * 3600)
    assert f"{8 * hours:,.0f} GPU hours, {8 * hours * 0.5:,.0f} kWh" in run_cost(config, p, run_seconds(p))
    assert run_cost(config, p, run_seconds(p)).endswith(f"{16 * hours:,.0f} dollars at 2 a GPU hour")
    assert mfu(p, config) == pytest.approx(64 * 8192 * p.work.model / (8 * p.time.total_s * 100e12))


def test_failures_make_it_longer(hardware: str) -> None:
    config, p = planned(hardware, 8, tp=8)
    assert failure_lines(config, p, 1e6) == []
    often = config.model_copy(update={"plan": config.plan.model_copy(update={"gpu_mttf_hours": 80.0})})
    (line,) = failure_lines(
        often, p, 0.944 * 86_400
    )  # one in 10 h: tau 1,470 s, and 30 s for a checkpoint, 600 s for a restart
    assert line.startswith("failures     one in 10 h, a checkpoint every 1.47e+03 s of work loses least; 94.4% of")
    assert line.endswith("the run takes 1 days")
    never = config.model_copy(update={"plan": config.plan.model_copy(update={"gpu_mttf_hours": 1e-3})})
    assert failure_lines(never, p, 1.0)[0].endswith("; 0.0% of the time is work that lasts, the run never ends")


def test_slow_hardware_has_a_rate_of_three_digits(tmp_path: Path) -> None:
    """A peak of 0.1 TFLOP/s, as a CPU's, does not print as 0."""
    path = tmp_path / "slow.yaml"
    path.write_text("{name: slow, bf16_tflops: 0.1, memory_gb: 500, memory_gb_per_s: 20}")
    config, p = planned(str(path), 1)
    assert f", {mfu(p, config) / 10:.3g} TFLOP/s a GPU" in "".join(speed_lines(config, p))


def test_the_step_says_that_offloading_is_not_timed(hardware: str) -> None:
    config, p = planned(hardware, 8, {"zero_stage": 2, "offload": "optimizer"}, dp_shard=8)
    (step,) = (line for line in speed_lines(config, p) if line.startswith("step "))
    assert step.endswith("; without the traffic and updates of engine.offload=optimizer)")


def test_what_does_not_fit_names_its_largest_part(hardware: str) -> None:
    config, p = planned(hardware, 1)
    said = fit_line(config, p.hardware, parts_of(p))
    assert said.startswith("does not fit ") and "most are optimizer, 96.4 GB: shard it" in said
    config, p = planned(hardware, 8, {"remat": "full", "zero_stage": 3}, dp_shard=8)
    left, said = 50e9 - p.memory_bytes, fit_line(config, p.hardware, parts_of(p))
    assert said == f"fits         {left / 1e9:.3g} GB of 50 GB less 0 (plan.reserve_gb) are left"


def test_a_remedy_is_not_what_is_done_already(hardware: str) -> None:
    config, p = planned(hardware, 8, {"remat": "full", "zero_stage": 3}, dp_shard=8)
    said = fit_line(config, p.hardware, {"activations": 10**12})
    assert said.endswith("most are activations, 1e+03 GB: lower train.micro_batch_seqs; or raise parallel.tp or cp")
    for part in ("policy", "weights", "gradients", "optimizer"):
        assert "engine." not in fit_line(config, p.hardware, {part: 10**12})
    said = fit_line(config, p.hardware, {"buffers": 10**12})
    assert said.endswith(" GB: raise parallel.tp or pp")  # the rest is not read by DeepSpeed


def test_remedies_follow_the_document(hardware: str) -> None:
    config, p = planned(hardware, 8, {"backend": "fsdp", "reshard": False, "remat": "selective"}, dp_shard=8)

    def said(part: str, changed: Config = config, useless: Sequence[str] = ()) -> str:
        return fit_line(changed, p.hardware, {part: 10**12}, useless).partition(" GB: ")[2]

    assert said("buffers") == "free weights after use: engine.reshard=true; or raise parallel.tp or pp"
    resharded = config.model_copy(update={"engine": config.engine.model_copy(update={"reshard": True})})
    assert said("buffers", resharded) == "raise parallel.tp or pp"
    assert said("activations").startswith("compute more of them again: engine.remat=full; or lower")
    assert "rollout.placement=separate" in said("generator")
    apart = config.model_copy(update={"rollout": config.rollout.model_copy(update={"placement": "separate"})})
    assert said("generator", apart) == "use hardware with more memory"
    assert "host memory" in said("critics") and said("critics", useless=[WAIT]) == "use more ranks"
    assert said("KV cache").startswith("lower rollout.max_batch_seqs; or lower rollout.max_new")
    served = config.model_copy(update={"rollout": config.rollout.model_copy(update={"generator": "vllm"})})
    assert said("KV cache", served).startswith("lower rollout.vllm.cache_gib; or lower rollout.max_new")


def test_there_is_no_fp8_on_an_a100() -> None:
    with pytest.raises(ValueError, match=r"engine.precision=fp8: A100 SXM 80 GB has no fp8; use bf16"):
        planned("a100", 1, {"precision": "fp8"})
