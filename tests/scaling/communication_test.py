"""The formulas of traffic against those of the papers; tests/parity/traffic_test.py holds them to what is sent."""

from __future__ import annotations

import pytest

from llmtrain.arch.resolve import parameter_count, resolve_model
from llmtrain.config.schema import EngineConfig, ModelConfig, ParallelConfig
from llmtrain.scaling.communication import CONTROL, Item, RankStep, Step, communication, moved_bytes
from llmtrain.scaling.parts import PERSISTENT

BIG = resolve_model(ModelConfig(preset="llama3-8b"))
STEP = Step(microbatches=1, rows=1, tokens=8192, trained_tokens=8192)


def items(model: ModelConfig, parallel: ParallelConfig, step: Step = STEP, **engine: object) -> list[Item]:
    rank = RankStep(model, parallel, EngineConfig(**engine), step)
    return [item for item in communication(rank) if item.what not in CONTROL]


@pytest.mark.parametrize(
    ("stage", "moved", "precision"), [(0, 2, "fp32"), (1, 3, "bf16"), (2, 3, "bf16"), (3, 3, "bf16")]
)
def test_zero_moves_so_many_times_the_weights(stage: int, moved: int, precision: str) -> None:
    """arXiv 1910.02054, section 7: 2, 2, 2, 3. DeepSpeed all-reduces at stages 1 and 2: one more."""
    value = 4 if precision == "fp32" else 2
    sent = items(BIG, ParallelConfig(dp_shard=64), zero_stage=stage, precision=precision)
    # Stage 3 gathers the embedding once, whose backward does not read it, and the head, which is used again at once.
    once = 2 * BIG.vocab_size * BIG.hidden_size / parameter_count(BIG) if stage == 3 else 0
    assert moved_bytes(sent) / (value * parameter_count(BIG)) == pytest.approx(moved - once, abs=0.001)


def test_fsdp_moves_three_times_the_weights_and_gradients_in_fp32() -> None:
    total = 2 * parameter_count(BIG)
    matrices = 2 * 2 * BIG.vocab_size * BIG.hidden_size  # gathered once, with the final norm
    sent = items(BIG, ParallelConfig(dp_shard=64), backend="fsdp")
    assert moved_bytes(sent) == 2 * total - matrices - 2 * BIG.hidden_size + 2 * total
    kept = items(BIG, ParallelConfig(dp_shard=64), backend="fsdp", reshard=False)
    assert moved_bytes(kept) == total + 2 * total


def test_small_parameters_stay_whole_under_stage_3() -> None:
    small = resolve_model(ModelConfig())
    assert max(small.hidden_size * small.ffn_size, small.hidden_size**2) <= PERSISTENT
    for microbatches in (1, 5):
        sent = items(small, ParallelConfig(dp_shard=4), STEP._replace(microbatches=microbatches), zero_stage=3)
        embedding = small.vocab_size * small.hidden_size
        again = embedding * (microbatches - 1)
        assert sum(i.size_bytes for i in sent if i.kind == "all_gather") == 2 * (parameter_count(small) + again)


def test_tensor_parallel_is_that_of_megatron() -> None:
    """arXiv 2205.05198, section 4.2: as many bytes with sequence parallelism as without."""
    plain, sequence = (
        items(BIG, ParallelConfig(dp_shard=1, tp=8, sequence_parallel=on), zero_stage=1) for on in (False, True)
    )
    hidden = 8192 * BIG.hidden_size * 2
    assert moved_bytes(i for i in plain if i.what != "log-probs") == 2 * hidden * (4 * BIG.num_layers + 2)
    norms = 2 * (2 * BIG.num_layers + 1) * BIG.hidden_size * 2
    assert moved_bytes(sequence) == moved_bytes(plain) + norms


def test_one_rank_sends_nothing() -> None:
    assert items(BIG, ParallelConfig(dp_shard=1)) == []
    assert communication(RankStep(BIG, ParallelConfig(dp_shard=1), EngineConfig(), STEP)) == []
