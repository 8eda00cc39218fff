"""FLOPs of a token against sums done by hand."""

from __future__ import annotations

import pytest

from llmtrain.arch.resolve import resolve_model, train_flops_per_token
from llmtrain.config.schema import EngineConfig, LoraConfig, ModelConfig
from llmtrain.scaling.work import work_of

BIG = resolve_model(ModelConfig(preset="llama3-8b"))
WEIGHTS = 8_030_261_248 - 128_256 * 4096  # without the embedding
PAIRS = 32 * (8192 + 1) / 2  # keys that a query sees, over 32 layers


def test_six_for_each_weight_and_attention_over_half_a_row() -> None:
    work = work_of(BIG, 8192, EngineConfig())
    assert work.model == pytest.approx(6 * WEIGHTS + 6 * 32 * (128 + 128) * PAIRS, rel=1e-12)
    assert work.head == 2 * 128_256 * 4096
    assert work.hardware == pytest.approx(work.model + work.head, rel=1e-12)  # logits in chunks


def test_full_recomputation_adds_a_forward_of_the_blocks() -> None:
    none, full = (work_of(BIG, 8192, EngineConfig(remat=remat)) for remat in ("none", "full"))
    assert full.model == none.model
    assert full.hardware - none.hardware == pytest.approx(
        2 * (WEIGHTS - 128_256 * 4096) + 2 * 32 * 256 * PAIRS, rel=1e-9
    )


def test_adapters_spare_the_gradients_of_weights() -> None:
    work = work_of(BIG.model_copy(update={"lora": LoraConfig()}), 8192, EngineConfig())
    assert work.model == pytest.approx(4 * WEIGHTS + 6 * 32 * 256 * PAIRS, rel=1e-12)


@pytest.mark.parametrize("preset", ["smollm2-135m", "gpt2", "deepseek-v3", "mixtral-8x7b", "gemma2-9b"])
def test_the_parts_are_the_whole(preset: str) -> None:
    model = resolve_model(ModelConfig(preset=preset))
    work = work_of(model, 1024, EngineConfig())
    assert work.model == pytest.approx(train_flops_per_token(model, 1024), rel=1e-12)
    assert min(work.blocks, work.attention, work.head) > 0
