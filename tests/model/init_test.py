"""Initial values: as each family publishes them, and of a scale that a deep model can be trained from."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from torch import Tensor

from llmtrain.config.families import presets
from llmtrain.config.parameters import layer_shapes, outer_shapes
from llmtrain.config.schema import ModelConfig
from llmtrain.config.shapes import resolve_model
from llmtrain.model.decoder import Decoder, init_std, init_tensor

WIDTH, HEADS, TOKENS = 32, 4, 8
FAMILIES = ("llama", "gpt2", "palm", "qwen2", "qwen3", "gemma2", "gemma3")
DENSE = [name for name, fields in presets().items() if fields["family"] in FAMILIES]


def narrow(real: ModelConfig) -> ModelConfig:
    """A preset of the same depth and proportions, 32 wide."""
    assert real.head_dim is not None
    head_dim = 2 * math.ceil(WIDTH * real.num_heads * real.head_dim / real.hidden_size / HEADS / 2)
    kv_heads = math.gcd(max(1, HEADS * real.num_kv_heads // real.num_heads), HEADS)
    shape = {"hidden_size": WIDTH, "num_heads": HEADS, "num_kv_heads": kv_heads, "head_dim": head_dim}
    shape |= {"ffn_size": WIDTH * real.ffn_size // real.hidden_size, "vocab_size": 64, "max_positions": 64}
    return resolve_model(real.model_copy(update={**shape, "preset": None}))


def real_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    front, behind = outer_shapes(model)
    layers = {f"layers.{i}.{n}": s for i in range(model.num_layers) for n, s in layer_shapes(model, i).items()}
    return {**front, **layers, **behind}


@torch.no_grad()
def initialized(real: ModelConfig) -> Decoder:
    """Narrow, with the initial values of the real width: a matrix is multiplied by sqrt(real / narrow fan-in), so that
    its product has the scale that it has there."""
    config, shapes = narrow(real), real_shapes(real)
    model = Decoder(config)
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            p.copy_(init_tensor(name, tuple(p.shape), config, 0))
            continue
        std = init_std(name, shapes[name], real)
        if "embed" not in name or (name == "embed.weight" and real.scale_embeddings):
            std *= math.sqrt(shapes[name][-1] / p.size(-1))
        p.normal_(0, std, generator=generator)
    model.head = None
    return model


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def scales(real: ModelConfig) -> tuple[list[float], list[float]]:
    """RMS of the residual stream in front of each block and behind the last, and of its gradient."""
    model = initialized(real)
    streams: list[Tensor] = []

    def keep(_: object, inputs: tuple) -> None:
        streams.append(inputs[0])

    for block in (*model.layers.values(), model.norm):
        block.register_forward_pre_hook(keep)
    ids = torch.randint(64, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    hidden = model(ids, torch.arange(TOKENS).expand_as(ids))
    noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
    gradients = torch.autograd.grad((hidden * noise).sum(), streams)
    return [rms(x) for x in streams], [rms(g) for g in gradients]


def distinct(names: list[str]) -> list[str]:
    """Without those that differ in RoPE, context or vocabulary only."""
    free = {"rope_scaling", "rope_theta", "max_positions", "vocab_size", "norm_eps", "tie_embeddings"}
    shapes = {str(sorted((k, str(v)) for k, v in presets()[n].items() if k not in free)): n for n in reversed(names)}
    return [name for name in names if name in shapes.values()]


@pytest.mark.parametrize("preset", distinct(DENSE))
def test_scale_by_depth(preset: str) -> None:
    """A block reads a normed stream, so what it adds has the same size at every depth, in nearly random directions:
    the stream grows as the root of the number of blocks, from the first one on (within 40 %: directions correlate a
    little, and the embedding counts in the shallow ones).

    Its norm divides the gradient that goes back through a branch by the stream's size: block l multiplies the squared
    gradient by 1 + c / l, all of them by a power of the depth. c is 1 for a linear branch, about 2 for one that is a
    product (gate and up, scores and values): at most L, where vanishing or exploding would be exponential in L. L^1.25
    leaves room; the lower bound says that it grows towards the input at least as the stream shrinks, but for a half.
    """
    real = resolve_model(ModelConfig(preset=preset))
    streams, gradients = scales(real)
    depth = real.num_layers
    growth, shrinking = streams[-1] / streams[1], gradients[1] / gradients[-1]
    assert 0.6 <= growth / math.sqrt(depth) <= 1.4
    assert 0.5 * growth <= shrinking <= depth**1.25
    middle = streams[depth // 2] / streams[1] / math.sqrt(depth // 2)
    assert 0.6 <= middle <= 1.4  # and not all at once


@pytest.mark.parametrize(
    ("preset", "low", "high"),
    [
        ("llama3-8b", 0.8, 1.25),  # branches divided by sqrt(2 layers): the same at the end of any depth
        ("gpt2-xl", 0.8, 1.25),
        ("qwen3-4b", 0.8, 1.25),
        ("palm-8b", 1.5, 2.2),  # not divided: four times the blocks, twice the stream
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
        ("gemma3-1b", {"embed": 0.02, "layers.1.attention.o": 0.02, "layers.1.feedforward.down": 0.02}),
    ],
)
def test_standard_deviations(preset: str, expected: dict[str, float]) -> None:
    model = resolve_model(ModelConfig(preset=preset))
    for module, std in expected.items():
        name = f"{module}.weight"
        columns = real_shapes(model)[name][1]
        assert init_std(name, real_shapes(model)[name], model) == pytest.approx(std)
        assert init_tensor(name, (32, columns), model, seed=3).std().item() == pytest.approx(std, rel=0.03)


def test_norms_and_biases() -> None:
    for family, factor in (("llama", 1.0), ("gpt2", 1.0), ("gemma3", 0.0)):
        model = resolve_model(ModelConfig(family=family))
        assert init_tensor("layers.0.attention_norm.weight", (8,), model, 0).eq(factor).all()
        assert init_tensor("layers.0.attention.q.bias", (8,), model, 0).eq(0).all()


def test_usual_values_are_bit_equal_to_those_of_earlier_versions() -> None:
    """What the README's runs began with."""
    generator = torch.Generator().manual_seed(
        int.from_bytes(hashlib.sha256(b"7/layers.2.feedforward.down.weight").digest()[:8], "little") >> 1
    )
    expected = torch.randn(4, 6, generator=generator) * (0.02 / math.sqrt(2 * 4))
    model = resolve_model(ModelConfig())
    assert torch.equal(init_tensor("layers.2.feedforward.down.weight", (4, 6), model, 7), expected)
