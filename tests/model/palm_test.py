"""Compares PaLM with its equations: transformers has no such class, so the reference is written here, from section 2 of
arXiv 2204.02311, in fp64 and with none of our modules."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llmtrain.arch.resolve import hf_config, resolve_model
from llmtrain.config.schema import ModelConfig
from llmtrain.model.decoder import Decoder
from llmtrain.rollout.native import NativeGenerator
from llmtrain.types import Prompt, Sampling
from tests.model.families import EXAMPLES, agree, check_shapes, random_ids

configs = st.builds(
    ModelConfig,
    family=st.just("palm"),
    num_layers=st.integers(1, 3),
    hidden_size=st.sampled_from([16, 32]),
    ffn_size=st.sampled_from([24, 64]),
    num_heads=st.sampled_from([1, 2, 4]),
    num_kv_heads=st.just(1),
    head_dim=st.sampled_from([4, 10]),
    vocab_size=st.sampled_from([61, 96]),
    max_positions=st.just(64),
    rope_theta=st.sampled_from([100.0, 10000.0]),
)
ONE = ModelConfig(
    family="palm", num_layers=2, hidden_size=32, num_heads=4, head_dim=10, vocab_size=96, max_positions=64
)


class Palm:
    """Computes y = x + MLP(LayerNorm(x)) + Attention(LayerNorm(x)), `weights` by our names."""

    def __init__(self, weights: dict[str, Tensor], config: ModelConfig) -> None:
        self.w = {name: x.detach().double().requires_grad_() for name, x in weights.items()}
        self.config = config

    def logits(self, ids: Tensor) -> Tensor:
        """Returns the logits [T, vocabulary] of ids [T]. The paper's embeddings E are ours times sqrt(n); its logits
        are E h / sqrt(n)."""
        root = math.sqrt(self.config.hidden_size)
        embeddings = self.w["embed.weight"] * root
        x = embeddings[ids]
        for i in range(self.config.num_layers):
            y = layer_norm(x, self.w[f"layers.{i}.attention_norm.weight"])
            x = x + self.feed_forward(f"layers.{i}.feedforward", y) + self.attention(f"layers.{i}.attention", y)
        return layer_norm(x, self.w["norm.weight"]) @ embeddings.T / root

    def feed_forward(self, name: str, x: Tensor) -> Tensor:
        """Computes SwiGLU, Swish(x W) * x V, and the projection back."""
        gate = x @ self.w[f"{name}.gate.weight"].T
        swish = gate / (1 + torch.exp(-gate))
        return (swish * (x @ self.w[f"{name}.up.weight"].T)) @ self.w[f"{name}.down.weight"].T

    def attention(self, name: str, x: Tensor) -> Tensor:
        """Computes multi-query attention: keys and values [T, head_dim] are shared by all heads."""
        tokens, size = x.size(0), self.config.head_dim
        q, k, v = (x @ self.w[f"{name}.{part}.weight"].T for part in "qkv")
        q = rotated(q.view(tokens, -1, size), self.config.rope_theta)
        k = rotated(k.view(tokens, 1, size), self.config.rope_theta)[:, 0]
        scores = torch.einsum("thd,sd->hts", q, k) / math.sqrt(size)
        later = torch.arange(tokens)[None, :] > torch.arange(tokens)[:, None]
        shares = torch.exp(scores - scores.amax(-1, keepdim=True)) * ~later
        mixed = torch.einsum("hts,sd->thd", shares / shares.sum(-1, keepdim=True), v)
        return mixed.reshape(tokens, -1) @ self.w[f"{name}.o.weight"].T


def layer_norm(x: Tensor, scale: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6) * scale


def rotated(x: Tensor, theta: float) -> Tensor:
    """Rotates x [T, heads, head_dim] as a product of complex numbers: value j with value j + head_dim / 2."""
    half = x.size(-1) // 2
    turns = torch.arange(x.size(0))[:, None] * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    y = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(turns), turns)[:, None]
    return torch.cat([y.real, y.imag], -1)


def random_pair(config: ModelConfig) -> tuple[Decoder, Palm]:
    torch.manual_seed(0)
    model = Decoder(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            _ = p.uniform_(0.5, 1.5) if p.dim() == 1 else p.normal_(0, 0.2)
    weights = {name: x for name, x in model.state_dict().items() if name != "head.weight"}
    return model, Palm(weights, config)


@EXAMPLES
@given(config=configs)
@torch.no_grad()
def test_logits(config: ModelConfig) -> None:
    config = resolve_model(config)
    check_shapes(config)
    model, palm = random_pair(config)
    ids = random_ids(config.vocab_size, 1, 20)[0]
    agree(model(ids[None], torch.arange(20)[None])[0], palm.logits(ids))
    positions = torch.cat([torch.arange(8), torch.arange(9), torch.zeros(3, dtype=torch.long)])[None]
    for segments, parts in (
        ([0] * 8 + [1] * 9 + [-1] * 3, [slice(0, 8), slice(8, 17)]),  # packed, padded on the right
        ([-1] * 8 + [0] * 9 + [-1] * 3, [slice(8, 17)]),  # padded on the left
    ):
        packed = model(ids[None], positions, torch.tensor(segments)[None])[0]
        for part in parts:
            agree(packed[part], palm.logits(ids[part]))


def test_gradients() -> None:
    model, palm = random_pair(resolve_model(ONE))
    ids = random_ids(96, 1, 20)[0]
    for logits in (model(ids[None], torch.arange(20)[None])[0], palm.logits(ids)):
        torch.nn.functional.cross_entropy(logits[:-1], ids[1:]).backward()
    for name, p in model.named_parameters():
        theirs = palm.w[name].grad
        assert theirs is not None and p.grad is not None and theirs.abs().max() > 0
        assert (p.grad - theirs).abs().max() <= 1e-4 * theirs.abs().max(), name


@torch.no_grad()
def test_generation() -> None:
    model, palm = random_pair(resolve_model(ONE))
    prompts = [Prompt(random_ids(96, 1, n, seed=n)[0].tolist()) for n in (5, 1, 30)]
    groups = NativeGenerator(model, 2, "cpu").generate(prompts, Sampling(20, temperature=0))
    for prompt, (sample,) in zip(prompts, groups, strict=True):
        ids = torch.tensor(prompt.ids)
        for _ in range(20):
            ids = torch.cat([ids, palm.logits(ids)[-1].argmax()[None]])
        assert prompt.ids + sample.ids == ids.tolist()


def test_no_form_on_disk() -> None:
    with pytest.raises(ValueError, match=r"model.family=palm: transformers has no such model; keep the run directory"):
        hf_config(ModelConfig(preset="palm-8b"))
