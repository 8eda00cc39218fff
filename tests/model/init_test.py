"""Checks that initial values are those that each family publishes, at a scale that a deep model can be trained from."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from torch import Tensor

from llmtrain.arch.families import presets
from llmtrain.arch.parameters import layer_shapes, outer_shapes
from llmtrain.arch.resolve import resolve_model
from llmtrain.config.schema import MlaConfig, ModelConfig
from llmtrain.model.decoder import Decoder, init_std, init_tensor

WIDTH, HEADS, RANK, ROWS, TOKENS = 64, 8, 32, 8, 8


def narrow(real: ModelConfig) -> ModelConfig:
    """Returns a model of the same depth and proportions, 64 wide, with as many experts, as many chosen."""
    assert real.head_dim is not None
    kv_heads = math.gcd(max(1, HEADS * real.num_kv_heads // real.num_heads), HEADS)
    shape = {"hidden_size": WIDTH, "num_heads": HEADS, "num_kv_heads": kv_heads, "vocab_size": 64, "max_positions": 64}
    shape |= {"ffn_size": inner(real.ffn_size, real), "head_dim": of_a_head(real.head_dim, real)}
    mla, moe = narrow_mla(real), real.moe
    if mla is not None:
        shape |= {"mla": mla, "head_dim": mla.nope_head_dim + mla.rope_head_dim}
    if moe is not None:
        sizes = {name: inner(getattr(moe, name), real) for name in ("expert_ffn_size", "shared_ffn_size")}
        shape["moe"] = moe.model_copy(update=sizes)
    return resolve_model(real.model_copy(update={**shape, "preset": None}))


def inner(size: int, real: ModelConfig) -> int:
    return WIDTH * size // real.hidden_size


def of_a_head(size: int, real: ModelConfig) -> int:
    """Returns a head width, even for RoPE, that keeps the proportion of all heads to the residual stream."""
    return 2 * math.ceil(WIDTH * real.num_heads * size / real.hidden_size / HEADS / 2)


def narrow_mla(real: ModelConfig) -> MlaConfig | None:
    """Returns latent ranks of half the width. In proportion, five numbers of V3's latent would be left; the fan-in
    behind a latent scales its gradient twice as much, which the matrix in front of it takes back with half the rows."""
    if real.mla is None:
        return None
    heads = ("nope_head_dim", "rope_head_dim", "v_head_dim")
    sizes: dict[str, int | None] = {name: of_a_head(getattr(real.mla, name), real) for name in heads}
    return MlaConfig(q_rank=real.mla.q_rank and RANK, kv_rank=RANK, **sizes)


def real_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    front, behind = outer_shapes(model)
    layers = {f"layers.{i}.{n}": s for i in range(model.num_layers) for n, s in layer_shapes(model, i).items()}
    return {**front, **layers, **behind}


@torch.no_grad()
def initialized(real: ModelConfig, generator: torch.Generator) -> Decoder:
    """Returns a narrow model with the initial values of the real width: a matrix is multiplied by sqrt(real / narrow
    fan-in), so that its product has the scale that it has there. The router too: with all experts but fewer columns,
    what it sends back is larger by real / narrow width, and what experts tell it, a sum over the width, smaller by as
    much."""
    config, shapes = narrow(real), real_shapes(real)
    model = Decoder(config)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            p.copy_(init_tensor(name, tuple(p.shape), config, 0))
            continue
        std = init_std(name, shapes[name], real)
        if "embed" not in name or (name == "embed.weight" and real.scale_embeddings):
            std *= math.sqrt(shapes[name][-1] / p.size(-1))
        p.normal_(0, std, generator=generator)
    model.head = None
    model.requires_grad_(False).embed.requires_grad_()  # only gradients of the stream are asked for
    return model


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def scales(real: ModelConfig, seed: int = 0) -> tuple[list[float], list[float]]:
    """Returns the RMS of the residual stream in front of each block and behind the last, and of its gradient."""
    generator = torch.Generator().manual_seed(seed)
    model = initialized(real, generator)
    streams: list[Tensor] = []

    def keep(_: object, inputs: tuple) -> None:
        streams.append(inputs[0])

    for block in (*model.layers.values(), model.norm):
        block.register_forward_pre_hook(keep)
    ids = torch.randint(64, (ROWS, TOKENS), generator=generator)
    hidden = model(ids, torch.arange(TOKENS).expand_as(ids))
    noise = torch.randn(hidden.shape, generator=generator)
    gradients = torch.autograd.grad((hidden * noise).sum(), streams)
    return [rms(x) for x in streams], [rms(g) for g in gradients]


def distinct(names: list[str]) -> list[str]:
    """Returns the presets without those that differ in RoPE, context or vocabulary only."""
    free = {"rope_scaling", "rope_theta", "max_positions", "vocab_size", "norm_eps", "tie_embeddings"}
    shapes = {str(sorted((k, str(v)) for k, v in presets()[n].items() if k not in free)): n for n in reversed(names)}
    return [name for name in names if name in shapes.values()]


def bounds(real: ModelConfig) -> tuple[float, float]:
    """Returns the bounds (c, growth of the stream by the root of the depth) of `test_scale_by_depth`.

    c is the number of factors in what a branch adds that depend on the stream. Feed-forward layers have 1 (GPT),
    2 (gate and up) or 3 (and the weight of one of two experts); attention has values, and queries and keys as far as
    softmax is sharp, up to 3. A block has about the mean of its halves.

    Of the mean of six or eight small experts little is left: their blocks are nearly attention alone, with flat scores.
    At first it averages t independent tokens at place t, which leaves 1 / t of the square; later the tokens have become
    alike, and all of it is left.
    """
    if real.moe is not None and real.moe.top_k > 2:
        return 2.0, math.sqrt(TOKENS / sum(1 / t for t in range(1, TOKENS + 1)))
    feedforward = 1 + real.gated + (real.moe is not None)
    return (feedforward + 3) / 2, 1.4


@pytest.mark.parametrize("preset", distinct(list(presets())))
def test_scale_by_depth(preset: str) -> None:
    """A block reads a normed stream, so what it adds has the same size at every depth, in nearly random directions:
    the stream grows as the root of the number of blocks, from the first one on (within 40 %: directions correlate a
    little, and the embedding counts in the shallow ones).

    Its norm divides the gradient that goes back through a branch by the stream's size: a block that adds the part f of
    the squared stream multiplies the squared gradient by 1 + c f, all of them by growth^(2 c). That is a power of the
    depth, in its second half too, where vanishing or exploding would be exponential in it. The lower bound says that
    the gradient grows towards the input at least as the stream shrinks, but for a half.
    """
    real = resolve_model(ModelConfig(preset=preset))
    streams, gradients = scales(real)
    depth, half = real.num_layers, real.num_layers // 2
    growth, shrinking = streams[-1] / streams[1], gradients[1] / gradients[-1]
    factors, most = bounds(real)
    assert 0.6 <= growth / math.sqrt(depth) <= most
    assert 0.6 <= streams[half] / streams[1] / math.sqrt(half) <= most  # and not all at once
    assert 0.5 * growth <= shrinking <= growth**factors
    assert gradients[half] / gradients[-1] <= (streams[-1] / streams[half]) ** 3


@pytest.mark.parametrize(
    ("preset", "low", "high"),
    [
        ("llama3-8b", 0.8, 1.25),  # branches divided by sqrt(2 layers): the same at the end of any depth
        ("gpt2-xl", 0.8, 1.25),
        ("qwen3-4b", 0.8, 1.25),
        ("mixtral-8x7b", 0.8, 1.25),
        ("qwen3-30b-a3b", 0.8, 1.25),
        ("palm-8b", 1.5, 2.2),  # not divided: four times the blocks, twice the stream
        ("deepseek-v2", 1.5, 2.2),
        ("gemma3-1b", 1.5, 2.2),  # each branch is normed to 1
    ],
)
def test_depth_scaling(preset: str, low: float, high: float) -> None:
    ends = [scales(resolve_model(ModelConfig(preset=preset, num_layers=layers)))[0][-1] for layers in (10, 40)]
    assert low <= ends[1] / ends[0] <= high


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("llama3-8b", {"embed": 0.02, "layers.1.attention.q": 0.02, "layers.1.attention.o": 0.02 / 8}),
        ("gpt2", {"embed": 0.02, "position_embed": 0.01, "layers.1.feedforward.down": 0.02 / 24**0.5}),
        # the paper's embeddings are N(0, 1); ours are divided by sqrt(hidden_size) = 64
        ("palm-8b", {"embed": 1 / 64, "layers.1.attention.o": 1 / 64, "layers.1.feedforward.down": 1 / 128}),
        ("qwen2-72b", {"head": 0.02, "layers.1.attention.o": 0.02 / 160**0.5}),
        ("mixtral-8x7b", {"layers.1.feedforward.router": 0.02, "layers.1.feedforward.experts.down": 0.02 / 8}),
        ("qwen3-30b-a3b", {"layers.1.attention.o": 0.02 / 96**0.5, "layers.1.feedforward.experts.gate": 0.02}),
        ("deepseek-v3", {"layers.1.attention.kv_b": 0.006, "layers.9.feedforward.shared.down": 0.006}),
        ("gemma3-1b", {"embed": 0.02, "layers.1.attention.o": 0.02, "layers.1.feedforward.down": 0.02}),
    ],
)
def test_standard_deviations(preset: str, expected: dict[str, float]) -> None:
    model = resolve_model(ModelConfig(preset=preset))
    for module, std in expected.items():
        name = module if ".experts." in module else f"{module}.weight"
        columns = real_shapes(model)[name][-1]
        assert init_std(name, real_shapes(model)[name], model) == pytest.approx(std)
        assert init_tensor(name, (32, columns), model, seed=3).std().item() == pytest.approx(std, rel=0.03)


def test_norms_and_biases() -> None:
    for family, factor in (("llama", 1.0), ("gpt2", 1.0), ("gemma3", 0.0)):
        model = resolve_model(ModelConfig(family=family))
        assert init_tensor("layers.0.attention_norm.weight", (8,), model, 0).eq(factor).all()
        assert init_tensor("layers.0.attention.q.bias", (8,), model, 0).eq(0).all()


def test_usual_values_are_bit_equal_to_those_of_earlier_versions() -> None:
    """The README's runs began with these values."""
    generator = torch.Generator().manual_seed(
        int.from_bytes(hashlib.sha256(b"7/layers.2.feedforward.down.weight").digest()[:8], "little") >> 1
    )
    expected = torch.randn(4, 6, generator=generator) * (0.02 / math.sqrt(2 * 4))
    model = resolve_model(ModelConfig())
    assert torch.equal(init_tensor("layers.2.feedforward.down.weight", (4, 6), model, 7), expected)
