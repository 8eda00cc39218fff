"""What samples holds and takes, by hand and against the generator's own cache and packed weights."""

from __future__ import annotations

import pytest
import torch

from llmtrain.arch.hardware import HARDWARE
from llmtrain.arch.resolve import resolve_model
from llmtrain.config.recipes import RECIPES, config_class
from llmtrain.config.schema import Config, ModelConfig
from llmtrain.model.decoder import Decoder
from llmtrain.model.kernels import packed
from llmtrain.rollout import native
from llmtrain.rollout.cache import KVCache
from llmtrain.scaling import sampler
from llmtrain.scaling.sampler import Asked, Sampler, kv_cache_bytes, packed_bytes, sampler_in_step

SMOLLM2 = resolve_model(ModelConfig(preset="smollm2-135m"))
N, ROW = 134_515_008, 30 * 2 * 3 * 64 * 1024 * 2  # parameters; a row of 1,024 tokens: 3 K/V heads of 64 in 30 layers
CPU = HARDWARE["a100"].model_copy(update={"device": "cpu"})
GIB = 2**30


def config(**rollout: object) -> Config:
    found = config_class()()
    changed = type(found.rollout).model_validate({"max_new_tokens": 768, **rollout})
    engine = found.engine.model_copy(update={"precision": "bf16"})
    train = found.train.model_copy(update={"seq_len": 1024})
    return found.model_copy(update={"rollout": changed, "engine": engine, "train": train})


@pytest.mark.parametrize("preset", ["llama3-8b", "gemma2-2b", "deepseek-v3"])
def test_the_cache_has_as_many_bytes_as_the_generators(preset: str) -> None:
    model = resolve_model(ModelConfig(preset=preset))
    cache = KVCache(model, 3, 8192, torch.bfloat16, torch.device("meta"))
    assert kv_cache_bytes(model, 3, 8192, 2) == cache.memory_bytes


SMALL = {"num_layers": 2, "hidden_size": 512, "ffn_size": 256, "num_heads": 8, "vocab_size": 1024, "max_positions": 64}


@pytest.mark.parametrize(
    "changes",
    [
        {"num_kv_heads": 2},  # q, k, v together are large, gate and up too, down is not
        {"num_kv_heads": 2, "tie_embeddings": False, "vocab_size": 64},
        {"preset": "gpt2", "num_kv_heads": 2, "head_dim": 64},
        {"preset": "deepseek-v3", "head_dim": 64},
    ],
)
def test_packed_weights_are_those_of_the_generator(changes: dict) -> None:
    model = resolve_model(ModelConfig(**SMALL | changes))
    with torch.device("meta"):
        decoder = Decoder(model)
    held = packed.Packed(decoder.to_empty(device="cpu"))
    held.refreshed()
    assert packed_bytes(model, 4) == held.memory_bytes > 0


def test_the_generators_own_constants() -> None:
    assert (sampler.LEAST_WEIGHTS, sampler.PREFILL_TOKENS) == (packed.LEAST_WEIGHTS, native._PREFILL_TOKENS)


def test_packed_weights_of_smollm2() -> None:
    """In each of 30 blocks q, k and v, o, gate and up, down; and the tied head."""
    block = 576 * (576 + 2 * 192) + 576 * 576 + 3 * 576 * 1536
    assert packed_bytes(SMOLLM2, 2) == 2 * (30 * block + 49_152 * 576) == 268_959_744


def test_native_on_a_cpu_keeps_its_weights_twice_while_it_samples() -> None:
    each = Sampler(config(), SMOLLM2, Asked(4, 8, 768, 1024), CPU)
    assert each.memory()["packed weights"] == packed_bytes(SMOLLM2, 2)
    assert each.memory()["KV cache"] == 32 * ROW and each.resting() == {"generator": 2 * N}
    for hardware in (HARDWARE["a100"], None):
        assert "packed weights" not in Sampler(config(), SMOLLM2, each.asked, hardware).memory()


def test_a_server_decodes_as_many_rows_as_its_cache_holds() -> None:
    """4 GiB hold 182 rows of 1,024 tokens; on a GPU it sleeps while others compute, on a CPU it cannot."""
    asked, document = Asked(64, 8, 768, 1024), config(generator="vllm")
    each = Sampler(document, SMOLLM2, asked, HARDWARE["a100"])
    assert 4 * GIB // ROW == 182 == each.slots()
    assert each.memory() == {"generator": 2 * N, "KV cache": 4 * GIB} and each.resting() == {}
    on_cpu = Sampler(document, SMOLLM2, asked, CPU)
    assert on_cpu.resting() == on_cpu.memory() == each.memory() | {"server": 3_000_000_000}
    few = Sampler(config(generator="vllm", max_batch_seqs=8), SMOLLM2, asked, None)
    assert few.slots() == 8
    small = Sampler(config(generator="vllm", vllm={"cache_gib": 0.02}), SMOLLM2, asked, None)
    with pytest.raises(ValueError, match=r"rollout.vllm.cache_gib=0.02: must hold a row of 1024 tokens, 0.022 GiB; "):
        small.memory()


@pytest.mark.parametrize(("row", "tokens"), [(1024, 8192), (16_384, 16_384)])
def test_a_forward_over_prompts_has_at_least_one_of_them(row: int, tokens: int) -> None:
    """As in `rollout.native`, however long it is; beside it are logits and their log-probs of 32 rows in fp32."""
    values = 4 * 576 + 2 * 64 * (9 + 3) + 4 * 1536  # of a block, a token
    held = Sampler(config(), SMOLLM2, Asked(4, 8, 768, row), None).memory()
    assert held["prompts"] == 2 * tokens * values + 2 * 4 * 32 * 49_152


def test_seconds_by_hand() -> None:
    """512 samples, 182 at a time: 2 rounds of 768 tokens, each of which reads weights and cache, and one of the 148
    that are left; the prompts once."""
    a100, flops = HARDWARE["a100"], 2 * N
    each = Sampler(config(generator="vllm"), SMOLLM2, Asked(64, 8, 768, 1024, times=2), a100)
    tokens = (3 * 2 * N + (182 + 182 + 148) * ROW) / 2039e9
    prompts = 64 * 256 * flops / (312e12 * 0.62)
    assert each.seconds(a100) == pytest.approx(2 * (768 * tokens + prompts))


def test_who_samples_in_a_step() -> None:
    grpo = RECIPES["grpo"]
    assert sampler_in_step(config(), SMOLLM2, grpo, 5, None).asked == Asked(7, 8, 768, 1024)  # 32 prompts on 5 ranks
    assert sampler_in_step(config(replay="a/rollouts"), SMOLLM2, grpo, 4, None) is None
    assert sampler_in_step(config(), SMOLLM2, RECIPES["dpo"], 4, None) is None
