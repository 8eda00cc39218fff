"""Bytes of model states against the table of the ZeRO paper and against sums done by hand."""

from __future__ import annotations

import pytest

from llmtrain.arch.parameters import is_block_matrix, mtp_shapes, numel
from llmtrain.arch.resolve import parameter_count, resolve_model
from llmtrain.config.schema import EngineConfig, ModelConfig, MoeConfig, ParallelConfig
from llmtrain.model.decoder import parameter_shapes
from llmtrain.scaling.parts import block_shapes, rank_shapes
from llmtrain.scaling.states import state_bytes, zero_bytes

BIG = resolve_model(ModelConfig(preset="llama3-8b"))


@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_zero_memory_is_that_of_the_paper(stage: int, gigabytes: float) -> None:
    """arXiv 1910.02054, figure 1: 7.5B parameters on 64 ranks."""
    assert sum(zero_bytes(7_500_000_000, stage, 64, "bf16")) / 1e9 == pytest.approx(gigabytes, abs=0.05)


def test_fp32_has_masters_at_stage_3() -> None:
    assert zero_bytes(100, 0, 4, "fp32") == (400, 400, 800)
    assert zero_bytes(100, 1, 4, "fp32") == (400, 400, 200)
    assert zero_bytes(100, 3, 4, "fp32") == (100, 100, 300)


def test_ranks_hold_the_whole_model_together() -> None:
    total = parameter_count(BIG)
    norms = numel(s for s in block_shapes(BIG, 0, 1) if len(s) == 1) * BIG.num_layers + 4096
    assert numel(rank_shapes(BIG, ParallelConfig(), 0)) == total
    assert 8 * numel(rank_shapes(BIG, ParallelConfig(tp=8), 0)) == total + 7 * norms  # norms are whole on each
    for schedule, virtual in (("1f1b", 1), ("interleaved_1f1b", 2), ("zbv", 2)):
        cut = ParallelConfig(pp=4, schedule=schedule, virtual_stages=virtual)
        assert sum(numel(rank_shapes(BIG, cut, rank)) for rank in range(4)) == total


def test_a_tied_embedding_is_held_by_both_ends_but_once_a_rank() -> None:
    tied = BIG.model_copy(update={"tie_embeddings": True})
    matrix = BIG.vocab_size * BIG.hidden_size
    for schedule, virtual, copies in (("1f1b", 1, 1), ("zbv", 2, 0)):
        cut = ParallelConfig(pp=2, schedule=schedule, virtual_stages=virtual)
        held = sum(numel(rank_shapes(tied, cut, rank)) for rank in range(2))
        assert held == parameter_count(tied) + copies * matrix


def test_modules_for_further_tokens_are_held_too() -> None:
    model = BIG.model_copy(update={"mtp_layers": 2})
    further = numel(mtp_shapes(model).values())
    assert further > 2 * numel(block_shapes(BIG, 0, 1))
    assert numel(rank_shapes(model, ParallelConfig(), 0)) == parameter_count(BIG) + further
    fsdp = state_bytes(model, ParallelConfig(dp_shard=4), EngineConfig(backend="fsdp"))
    assert fsdp.weights == parameter_count(BIG) + further  # 4 bytes, on 4 ranks


def test_eighteen_bytes_a_parameter() -> None:
    """bf16 weight, fp32 master, fp32 gradient, two fp32 moments; DeepSpeed's gradients are bf16."""
    total, one = parameter_count(BIG), ParallelConfig(dp_shard=1)
    fsdp = state_bytes(BIG, one, EngineConfig(backend="fsdp", reshard=False))
    assert fsdp.gathered == 2 * total and sum(fsdp[:4]) == 18 * total
    assert sum(state_bytes(BIG, one, EngineConfig(zero_stage=1))) == 16 * total


def test_fsdp_shards_over_dp_shard_and_cp_and_copies_over_dp_replicate() -> None:
    total = parameter_count(BIG)
    for parallel, ranks in (
        (ParallelConfig(dp_shard=4, cp=2), 8),
        (ParallelConfig(dp_shard=4, dp_replicate=2), 4),
    ):
        states = state_bytes(BIG, parallel, EngineConfig(backend="fsdp"))
        assert states[:3] == (4 * total // ranks, 4 * total // ranks, 8 * total // ranks)


def test_a_step_of_one_microbatch_has_no_whole_gradients() -> None:
    parallel, engine = ParallelConfig(dp_shard=8), EngineConfig(backend="fsdp")
    block = numel(block_shapes(BIG, 0, 1))
    rest = 2 * BIG.vocab_size * BIG.hidden_size + BIG.hidden_size
    one, two = (state_bytes(BIG, parallel, engine, accumulation=n) for n in (1, 2))
    assert one.gathered == two.gathered == 2 * (rest + 2 * block)
    assert (one.unreduced, two.unreduced) == (2 * block, 4 * parameter_count(BIG) * 7 // 8)


def test_offload_leaves_the_device() -> None:
    parallel = ParallelConfig(dp_shard=4)
    for stage, offload, weights in ((2, "optimizer", True), (3, "nvme", True), (3, "params", False)):
        states = state_bytes(BIG, parallel, EngineConfig(zero_stage=stage, offload=offload))
        assert (bool(states.weights), states.gradients, states.optimizer) == (weights, 0, 0)


def test_muon_has_one_momentum_for_matrices_of_blocks() -> None:
    engine = EngineConfig(zero_stage=0, precision="fp32")
    matrices = BIG.num_layers * numel(s for s in block_shapes(BIG, 0, 1) if len(s) > 1)
    adamw, muon = (state_bytes(BIG, ParallelConfig(dp_shard=1), engine, name) for name in ("adamw", "muon"))
    assert adamw.optimizer - muon.optimizer == 4 * matrices


def test_muon_counts_the_blocks_of_multi_token_modules() -> None:
    """What the optimizer is given, by the names of a real decoder."""
    config = resolve_model(ModelConfig(family="deepseek-v3", num_layers=2, mtp_layers=2, vocab_size=64))
    shapes = {name: shape for name, shape in parameter_shapes(config).items() if not name.endswith("router.bias")}
    matrices = numel(shape for name, shape in shapes.items() if is_block_matrix(name, shape))
    adamw, muon = (state_bytes(config, ParallelConfig(dp_shard=1), EngineConfig(), n) for n in ("adamw", "muon"))
    assert adamw.optimizer - muon.optimizer == 4 * matrices


def test_under_zero_1_and_2_muon_shards_its_momentum_and_gathers_directions() -> None:
    matrices = BIG.num_layers * numel(s for s in block_shapes(BIG, 0, 1) if len(s) > 1)
    for stage in (1, 2):
        engine = EngineConfig(zero_stage=stage, precision="bf16")
        adamw, muon = (state_bytes(BIG, ParallelConfig(dp_shard=4), engine, name) for name in ("adamw", "muon"))
        assert adamw.optimizer - muon.optimizer == matrices and muon.gathered - adamw.gathered == 2 * matrices


def test_muon_with_experts_on_ranks_of_their_own() -> None:
    """The momentum of experts is divided among the ranks that have them, which are 1 / ep of all."""
    fields = {"num_experts": 8, "expert_ffn_size": 64}
    shape = {"num_layers": 2, "hidden_size": 64, "ffn_size": 64, "vocab_size": 64}
    config = resolve_model(ModelConfig(**shape, moe=MoeConfig(**fields)))
    shapes = {name: shape for name, shape in parameter_shapes(config).items() if is_block_matrix(name, shape)}
    experts = numel(shape for shape in shapes.values() if len(shape) == 3)
    rest = numel(shapes.values()) - experts
    for backend in ("fsdp", "deepspeed"):
        engine, parallel = EngineConfig(backend=backend, zero_stage=1), ParallelConfig(dp_shard=4, ep=2)
        adamw, muon = (state_bytes(config, parallel, engine, name) for name in ("adamw", "muon"))
        assert adamw.optimizer - muon.optimizer == 4 * rest // 4 + 4 * (experts // 2) // 2


def test_a_pipeline_rank_may_have_no_experts_and_a_refused_layout_less_than_one() -> None:
    """The first layers of DeepSeek are dense; a search looks at states before the rules refuse tp x ep above the
    experts."""
    moe = MoeConfig(num_experts=4, top_k=2, dense_layers=[0])
    model = resolve_model(ModelConfig(num_layers=2, num_heads=8, num_kv_heads=8, moe=moe))
    cut = ParallelConfig(pp=2, dp_shard=2, ep=2)
    dense, routed = (state_bytes(model, cut, EngineConfig(), pp_rank=rank) for rank in (0, 1))
    assert dense.weights == 2 * numel(rank_shapes(model, cut, 0)) and dense.gradients <= dense.weights
    assert routed.weights == 2 * numel(rank_shapes(model, cut, 1))
    assert state_bytes(model, ParallelConfig(tp=4, dp_shard=2, ep=2), EngineConfig()).weights > 0
