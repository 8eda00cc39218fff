"""What a rank holds at the moments of a step, by hand; tests/parity/peak_test.py holds it to the allocator's peak."""

from __future__ import annotations

import pytest

from llmtrain.arch.pipeline import plan_stages
from llmtrain.arch.resolve import resolve_model
from llmtrain.config.schema import Config, EngineConfig, ModelConfig, ParallelConfig, TrainConfig
from llmtrain.scaling.activations import kept_on, logits_bytes
from llmtrain.scaling.memory import Memory, Rank, rank_states
from llmtrain.scaling.plan import plan

H, FFN, V, LAYERS, T = 128, 384, 1024, 4, 64
BLOCK = 4 * H + 2 * 32 * (4 + 2) + 4 * FFN  # values a token: inputs and norms; q, k, v, output; gate, up, silu, product
WORKING = 3 * FFN + H  # gradients of the product, of both factors, of the output
ONE = 2 * 2 * T  # bytes of a value of each token of two rows of a microbatch in bf16
WEIGHTS = 4 * (2 * H * H + 2 * 64 * H + 3 * H * FFN + 2 * H) + 2 * V * H + H


def moments(accumulation: float = 1, pp_rank: int = 0, parallel: dict | None = None, **engine: object) -> dict:
    """Returns the moments of a rank by name."""
    model = resolve_model(ModelConfig(num_kv_heads=2, tie_embeddings=False))
    layout = ParallelConfig(dp_shard=1, **parallel or {})
    train = TrainConfig(seq_len=T, micro_batch_seqs=2)
    config = Config(train=train, parallel=layout, engine=EngineConfig(**engine))
    states = rank_states(config, model, layout, accumulation)[pp_rank]
    found = Rank(config, model, layout, accumulation, pp_rank, states).moments()
    return {memory.moment: memory for memory in found}


def test_activations() -> None:
    """In bf16: all layers; with a part of the row or of the heads less; with recomputation one layer whole."""
    assert moments()["head"].activations == LAYERS * ONE * BLOCK
    assert moments()["block"].activations == ONE * (LAYERS * BLOCK + WORKING)
    assert moments(parallel={"cp": 2})["head"].activations == LAYERS * ONE * BLOCK // 2
    outside = 2 * H + 2 * 2 * H  # inputs are halves; what is normed is gathered, and kept whole
    assert moments(parallel={"tp": 2})["head"].activations == LAYERS * ONE * (BLOCK - 4 * H + outside) // 2
    plain = {"tp": 2, "sequence_parallel": False}
    assert moments(parallel=plain)["head"].activations == LAYERS * ONE * (4 * H + (BLOCK - 4 * H) // 2)
    full = moments(remat="full")
    assert (full["head"].activations, full["forward"].activations) == (ONE * 4 * H, ONE * (3 * H + BLOCK))
    assert full["block"].activations == ONE * (3 * H + BLOCK + WORKING)
    kept = 2 * H + 32 * (4 + 2 + 2) + 4 * 32 + 2 * FFN
    assert moments(remat="selective")["block"].activations == ONE * (3 * kept + BLOCK + WORKING)


def test_gradients_come_while_activations_go() -> None:
    """With one microbatch there are none until the head's are made, and all but those of the embedding and the first
    block when that has its backward; with two there are all of the first microbatch's from the start."""
    one, two = moments(1), moments(2)
    whole = 2 * WEIGHTS
    assert [one[name].gradients + one[name].buffers for name in ("forward", "head", "block")] == [0, 0, 2 * V * H]
    first = 2 * H * H + 2 * 64 * H + 3 * H * FFN + 2 * H + V * H
    assert one["last"].gradients + one["last"].buffers == whole - 2 * first
    assert one["last"].activations == ONE * (BLOCK + WORKING)
    for name in ("forward", "head", "block"):
        assert two[name].gradients + two[name].buffers == whole


def test_the_head_adds_up_its_gradient_in_fp32() -> None:
    """A chunk of logits and its gradient take 8 bytes; the weight's gradient 4, a chunk's part of it 2."""
    assert moments()["head"].logits == 2 * T * V * 8 + V * H * (4 + 2) + 2 * ONE * H
    assert moments(precision="fp32")["head"].logits == 2 * T * V * 4 + V * H * (4 + 4) + 2 * 2 * ONE * H
    assert moments(parallel={"tp": 2})["head"].logits == (2 * T * V * 8 + V * H * (4 + 2)) // 2 + 2 * ONE * H


def test_pipeline_ranks_have_moments_of_their_own() -> None:
    """The first of two holds two microbatches, the last one and the head. Two microbatches are all in flight before the
    first backward; of four the third meets the gradients of the first."""
    layout = {"pp": 2, "stage_layers": [2, 2]}
    first, last = moments(2, 0, layout), moments(2, 1, layout)
    assert "head" not in first and first["block"].activations == ONE * (2 * 2 * BLOCK + WORKING)
    assert last["head"].activations == 2 * ONE * BLOCK and last["head"].logits > 0
    assert first["block"].gradients + first["block"].buffers == 0
    assert first["last"].activations == ONE * (3 * BLOCK + WORKING)  # one layer, and another microbatch
    assert last["head"].gradients + last["head"].buffers > 0  # of the first microbatch
    assert moments(4, 0, layout)["block"].gradients > 0


def test_weights_that_are_whole_at_moments() -> None:
    """FSDP2 has what is outside blocks and two of them, at the head one; ZeRO stage 3 on two ranks has everything that
    it does not keep whole anyway, a second time while it arrives but for the embedding, and at the end a block."""
    block, rest = WEIGHTS // 4 - (2 * V * H + H) // 4, 2 * V * H + H
    assert block * 4 + rest == WEIGHTS
    fsdp = moments(backend="fsdp")
    reduced = 2 * block  # a block's gradients before they are reduced
    assert fsdp["forward"].buffers == 2 * (rest + 2 * block)
    assert fsdp["head"].buffers == 2 * (rest + block) and fsdp["last"].buffers <= 2 * (rest + 2 * block) + reduced
    wide = resolve_model(ModelConfig(hidden_size=512, num_heads=8, num_kv_heads=8, tie_embeddings=False))
    layout, engine = ParallelConfig(dp_shard=2), EngineConfig(zero_stage=3)
    config = Config(train=TrainConfig(seq_len=T), parallel=layout, engine=engine)
    rank = Rank(config, wide, layout, 2, 0, rank_states(config, wide, layout, 2)[0])
    own, large = rank.whole_weights(), 4 * (4 * 512 * 512 + 3 * 512 * 384) + 2 * V * 512
    assert (own.gathered, own.arriving) == (2 * large, 2 * (large - V * 512))
    assert own.late == 2 * (4 * 512 * 512 + 3 * 512 * 384 + 2 * 512)


def test_the_update_copies_gradients_of_the_largest_group() -> None:
    """DeepSpeed's stage 1: matrices in bf16 and in fp32, on two ranks half of each; offloaded none."""
    matrices = WEIGHTS - 9 * H
    assert moments(2, zero_stage=1)["update"].buffers == 6 * matrices
    assert moments(2, zero_stage=1, precision="fp32")["update"].buffers == 4 * matrices
    assert moments(2, zero_stage=2, offload="optimizer")["update"].buffers == 0
    assert moments(2, backend="fsdp")["update"].buffers == 0


def test_the_plan_is_the_fullest_moment_of_the_fullest_rank() -> None:
    model = ModelConfig(num_kv_heads=2, tie_embeddings=False)
    parallel = ParallelConfig(pp=2, stage_layers=[2, 2])
    config = Config(model=model, parallel=parallel, train=TrainConfig(seq_len=T, micro_batch_seqs=2))
    each = [memory for rank in (0, 1) for memory in moments(4, rank, {"pp": 2, "stage_layers": [2, 2]}).values()]
    assert plan(config, 2).memory == max(each, key=lambda memory: memory.total)
    assert isinstance(each[0], Memory) and plan(config, 2).memory_bytes == max(memory.total for memory in each)


@pytest.mark.parametrize(
    ("tokens", "compiled", "expected"),
    [(256, False, 2 * 4 * 256), (32_768, False, 8 * (2**28 // 151_936)), (32_768, True, 4 * (2**29 // 151_936))],
)
def test_logits_of_one_chunk(tokens: int, compiled: bool, expected: int) -> None:
    """As many as a microbatch has, 2^28 fp32 numbers, or 2^29 of the compute's when compiled."""
    model, rows = resolve_model(ModelConfig(preset="qwen3-0.6b")), 151_936
    train = TrainConfig(seq_len=tokens, micro_batch_seqs=1, global_batch_seqs=1)
    config = Config(engine=EngineConfig(compile=compiled), train=train)
    assert logits_bytes(config, model, {"cp": 1, "tp": 1}) == expected * rows


def test_a_scalar_head_has_no_logits() -> None:
    assert plan(Config(model=ModelConfig(head="scalar")), 1).memory.logits == 0


def test_layers_that_a_rank_keeps() -> None:
    """By hand. 1F1B: two microbatches of the first rank's layers, one of the second's. Interleaved, 2 ranks of 2
    stages: forwards before the first backward are, on the first rank, 2 of its first stage, 2 of its second, and again
    one of its first; on the second rank 2 and 1."""

    def kept(layers: list[int], microbatches: float | None, **more: object) -> float:
        config = Config(parallel=ParallelConfig(pp=2, stage_layers=layers, **more))
        model = resolve_model(ModelConfig(num_layers=sum(layers), vocab_size=16))
        return max(kept_on(rank, plan_stages(model, config.parallel), config.parallel, microbatches) for rank in (0, 1))

    assert (kept([10, 2], 8), kept([2, 10], 8), kept([6, 6], 1), kept([10, 2], None)) == (20, 10, 6, 20)
    interleaved = {"schedule": "interleaved_1f1b", "virtual_stages": 2}
    assert kept([3, 1, 2, 1], 4, **interleaved) == 3 * 3 + 2 * 2
    assert kept([1, 5, 1, 4], 4, **interleaved) == 2 * 5 + 1 * 4
