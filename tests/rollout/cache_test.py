"""What each kind of layer keeps: its memory, and that decoding with it is decoding without."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmtrain.arch.resolve import resolve_model
from llmtrain.config.schema import MlaConfig, ModelConfig
from llmtrain.model.decoder import Decoder, initialize
from llmtrain.rollout.cache import KVCache, kept
from llmtrain.rollout.native import NativeGenerator
from llmtrain.types import Prompt, Sampling
from tests.rollout.native_test import flat

SHAPE = {"num_layers": 3, "hidden_size": 48, "ffn_size": 80, "num_heads": 6, "vocab_size": 97, "max_positions": 512}
MLA = MlaConfig(q_rank=20, kv_rank=16, nope_head_dim=8, rope_head_dim=4, v_head_dim=10)
LATENT = {"attention": "mla", "mla": MLA, "rope_interleaved": True, "num_kv_heads": 6}
SLIDING = {"num_kv_heads": 2, "head_dim": 10, "layer_types": ["sliding", "full"]}
CONFIGS = {
    "grouped": {"num_kv_heads": 2},
    "latent": LATENT,
    "latent, no query rank": {**LATENT, "mla": MLA.model_copy(update={"q_rank": None})},
    "window below a bucket": {**SLIDING, "sliding_window": 5},
    "window of a bucket": {**SLIDING, "sliding_window": 64, "rope_theta_sliding": 100.0},
    "window above all": {**SLIDING, "sliding_window": 300},
    "all sliding": {**SLIDING, "layer_types": ["sliding"], "sliding_window": 70},
    "learned positions": {"num_kv_heads": 6, "positions": "learned", "norm": "layer", "norm_bias": True},
}


def decoder(name: str) -> Decoder:
    config = resolve_model(ModelConfig(**{**SHAPE, **CONFIGS[name]}))
    model = Decoder(config).eval()
    initialize(model, config, seed=0)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8 if p.dim() == 2 else 1)
    return model


def prompts(lengths: tuple[int, ...]) -> list[Prompt]:
    generator = torch.Generator().manual_seed(2)
    return [Prompt(torch.randint(97, (n,), generator=generator).tolist(), seed=i) for i, n in enumerate(lengths)]


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_equals_recomputation(name: str) -> None:
    """Rows of many lengths, one of them longer than any ring, on slots that are moved and used again."""
    model = decoder(name)
    sampling = Sampling(12, num_samples=2, temperature=1.2, stop_ids=tuple(range(8)))
    samples = flat(NativeGenerator(model, 3, "cpu").generate(prompts((5, 1, 200, 60)), sampling))
    assert len({len(r.ids) for r in samples}) > 1  # rows end at different steps
    for sample in samples:
        ids = torch.tensor([sample.prompt_ids + sample.ids])
        positions = torch.arange(ids.size(1) - 1)[None]
        logp, _ = model(ids[:, :-1], positions, labels=ids[:, 1:], temperature=torch.tensor([1.2]))
        got, expected = torch.tensor(sample.logprobs), logp[0, len(sample.prompt_ids) - 1 :]
        assert (got - expected).abs().max() <= 1e-4


@torch.no_grad()
def test_a_ring_turns() -> None:
    """Decoding goes round a ring of 64 more than once, and greedy tokens are those of the full forward."""
    model = decoder("window below a bucket")
    (sample,) = flat(NativeGenerator(model, 1, "cpu").generate(prompts((3,)), Sampling(150, temperature=0)))
    ids = torch.tensor([sample.prompt_ids + sample.ids])
    logits = model(ids[:, :-1], torch.arange(ids.size(1) - 1)[None])
    assert logits[0, 2:].argmax(-1).tolist() == sample.ids


def cache_of(name: str, slots: int, tokens: int, dtype: torch.dtype = torch.bfloat16) -> KVCache:
    config = resolve_model(ModelConfig(**{**SHAPE, **CONFIGS[name]}))
    return KVCache(config, slots, tokens, dtype, torch.device("cpu"))


def test_memory() -> None:
    """Bytes of 7 rows of 448 tokens in bf16."""
    rows, tokens, layers, element = 7, 448, 3, 2
    expected = {
        "grouped": layers * rows * tokens * 2 * (2 * 8) * element,
        "latent": layers * rows * tokens * (16 + 4) * element,
        "window below a bucket": rows * (64 + tokens + 64) * 2 * (2 * 10) * element,
        "window above all": rows * (320 + tokens + 320) * 2 * (2 * 10) * element,
        "all sliding": layers * rows * 128 * 2 * (2 * 10) * element,
    }
    assert {name: cache_of(name, rows, tokens).memory_bytes for name in expected} == expected
    assert cache_of("window above all", 1, 128).memory_bytes == layers * 128 * 2 * 20 * element  # no more than the row


def test_deepseek_v2_against_its_heads() -> None:
    """The published saving: a latent of 512 + 64 numbers in place of the keys and values of 128 heads."""
    mla = MlaConfig(q_rank=1536, kv_rank=512, nope_head_dim=128, rope_head_dim=64, v_head_dim=128)
    heads = {"hidden_size": 5120, "num_heads": 128, "num_kv_heads": 128}
    latent = kept(resolve_model(ModelConfig(attention="mla", mla=mla, **heads)), 0, 64)
    plain = kept(resolve_model(ModelConfig(head_dim=128, **heads)), 0, 64)
    numbers = [x.heads * (x.key_dim + x.value_dim) for x in (latent, plain)]
    assert numbers == [576, 32768]


def visible(cache: KVCache, kind: str, positions: list[int]) -> list[list[int]]:
    masks, _ = cache.decoding(positions)
    return [row.nonzero()[:, 0].tolist() for row in masks[kind][:, 0, 0]]


def test_masks() -> None:
    cache = cache_of("window below a bucket", 3, 256)
    assert visible(cache, "sliding", [2, 66, 200]) == [[0, 1, 2], [0, 1, 2, 62, 63], [4, 5, 6, 7, 8]]
    full = visible(cache, "full", [2, 66, 200])
    assert full == [list(range(t + 1)) for t in (2, 66, 200)]
    assert cache.decoding([2, 66])[0]["full"].shape == (2, 1, 1, 128)
    assert cache.decoding([2, 66])[0]["sliding"].shape == (2, 1, 1, 64)


def test_rows_are_filled_and_moved() -> None:
    cache = cache_of("window below a bucket", 2, 256, torch.float32)

    def block(tokens: int) -> list[Tensor]:
        return [torch.arange(float(tokens))[None, :, None].expand(2, tokens, 10)] * 3

    cache.fill(1, block(100), block(100))
    assert cache.keys[0][1, 0, :, 0].tolist() == [*range(64, 100), *range(36, 64)]
    assert cache.values[1][1, 0, :100, 0].tolist() == list(range(100))
    cache.move(1, 0, 100)
    for kept_block in (*cache.keys, *cache.values):
        assert torch.equal(kept_block[0], kept_block[1])
    assert cache.holds(2, 256) and not cache.holds(3, 256) and not cache.holds(2, 257)


def test_weights_are_loaded_with_buffers() -> None:
    """What is no parameter but belongs to the weights is demanded and copied too."""
    model = decoder("latent")
    model.layers["1"].feedforward.register_buffer("bias", torch.zeros(3))
    generator, weights = NativeGenerator(model, 1, "cpu"), dict(model.state_dict())
    del weights["head.weight"]
    name = "layers.1.feedforward.bias"
    generator.load_weights({**weights, name: torch.ones(3)}.items(), 1)
    assert model.layers["1"].feedforward.bias.tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match=f"{name}: not among the weights"):
        generator.load_weights(((n, x) for n, x in weights.items() if n != name), 2)
