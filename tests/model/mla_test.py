"""Compares latent attention with transformers, the form for decoding with the one for training, and shards of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DeepseekV3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

from llmtrain.arch.parameters import layer_shapes
from llmtrain.arch.resolve import resolve_model
from llmtrain.config.schema import LoraConfig, MlaConfig, ModelConfig, RopeScaling
from llmtrain.model.attention import View, attention_mask
from llmtrain.model.decoder import Decoder, parameter_shapes
from llmtrain.model.mla import LatentAttention
from llmtrain.model.rope import rope_angles, rope_frequencies, rope_magnitude

YARN = RopeScaling(type="yarn", factor=4.0, original_max_positions=32, mscale=0.7, mscale_all_dim=1.2)


def latent_config(**changes: object) -> ModelConfig:
    mla = MlaConfig(q_rank=20, kv_rank=24, nope_head_dim=10, rope_head_dim=8, v_head_dim=14)
    shape = {"hidden_size": 48, "num_heads": 4, "num_kv_heads": 4, "num_layers": 2, "ffn_size": 64, "vocab_size": 97}
    return resolve_model(ModelConfig(**{"attention": "mla", "mla": mla, "rope_interleaved": True, **shape, **changes}))


def random_attention(config: ModelConfig, seed: int = 0) -> LatentAttention:
    torch.manual_seed(seed)
    module = LatentAttention(config)
    with torch.no_grad():
        for p in module.parameters():
            p.uniform_(0.5, 1.5) if p.dim() == 1 else p.normal_(0, 0.2)
    return module


def view_of(config: ModelConfig, positions: Tensor, mask: Tensor | None = None) -> View:
    freqs = rope_frequencies(config.mla.rope_head_dim, config.rope_theta, config.rope_scaling, positions.device)
    cos, sin = rope_angles(positions, freqs, torch.float32, rope_magnitude(config.rope_scaling))
    return View(cos, sin, mask)


def hidden_states(config: ModelConfig, B: int = 2, T: int = 37) -> tuple[Tensor, Tensor]:
    return torch.randn(B, T, config.hidden_size), torch.arange(T).expand(B, T)


class Past:
    """Implements a LayerCache of any length."""

    def __init__(self) -> None:
        self.k, self.v = [], []

    def __call__(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.k.append(k)
        self.v.append(v)
        return torch.cat(self.k, 2), torch.cat(self.v, 2)


def theirs(config: ModelConfig, ours: LatentAttention) -> tuple[DeepseekV3Attention, Tensor, float]:
    """Returns their module with our weights, its frequencies, and the factor of cos and sin."""
    a, s = config.mla, config.rope_scaling
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if s is not None:
        names = ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
        rope |= {"rope_type": "yarn", "original_max_position_embeddings": s.original_max_positions}
        rope |= {name: getattr(s, name) for name in names}
    reference = DeepseekV3Config(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_heads,
        q_lora_rank=a.q_rank,
        kv_lora_rank=a.kv_rank,
        qk_nope_head_dim=a.nope_head_dim,
        qk_rope_head_dim=a.rope_head_dim,
        v_head_dim=a.v_head_dim,
        rope_interleave=config.rope_interleaved,
        rope_parameters=rope,
        max_position_embeddings=128,
        attn_implementation="eager",
    )
    module = DeepseekV3Attention(reference, 0)
    names = {"q": "q_proj", "q_a": "q_a_proj", "q_a_norm": "q_a_layernorm", "q_b": "q_b_proj", "o": "o_proj"}
    names |= {"kv_a": "kv_a_proj_with_mqa", "kv_a_norm": "kv_a_layernorm", "kv_b": "kv_b_proj"}
    module.load_state_dict({f"{names[n.split('.')[0]]}.weight": p for n, p in ours.state_dict().items()})
    if s is None:
        return module, rope_frequencies(a.rope_head_dim, config.rope_theta, None, torch.device("cpu")), 1.0
    return (module, *ROPE_INIT_FUNCTIONS["yarn"](reference, "cpu"))


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("scaling", [None, YARN, YARN.model_copy(update={"mscale_all_dim": 0.0})])
@pytest.mark.parametrize("q_rank", [None, 20])
@torch.no_grad()
def test_equals_transformers(q_rank: int | None, scaling: RopeScaling | None, interleaved: bool) -> None:
    base = latent_config()
    mla = base.mla.model_copy(update={"q_rank": q_rank})
    config = base.model_copy(update={"mla": mla, "rope_scaling": scaling, "rope_interleaved": interleaved})
    ours = random_attention(config)
    reference, freqs, factor = theirs(config, ours)
    x, positions = hidden_states(config)
    angle = torch.cat([positions[..., None] * freqs] * 2, -1)
    causal = torch.full((37, 37), float("-inf")).triu(1)[None, None]
    expected, _ = reference(x, (angle.cos() * factor, angle.sin() * factor), causal)
    assert expected.std() > 0.3
    assert (ours(x, view_of(config, positions)) - expected).abs().max() <= 1e-5


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    theta=st.sampled_from([50.0, 1e4, 5e5]),
    factor=st.sampled_from([0.5, 1.0, 4.0, 40.0]),
    original=st.sampled_from([8, 64, 4096]),
    mscale=st.sampled_from([0.0, 0.7, 1.0]),
    all_dim=st.sampled_from([0.0, 0.7, 1.0]),
    betas=st.sampled_from([(32.0, 1.0), (2.0, 1.0), (1.0, 1.0), (400.0, 0.1)]),
    width=st.sampled_from([2, 8, 64]),
)
def test_yarn_equals_transformers(
    theta: float,
    factor: float,
    original: int,
    mscale: float,
    all_dim: float,
    betas: tuple[float, float],
    width: int,
) -> None:
    """Frequencies and magnitude, at the edges too: everything turns fast, everything slow, an empty ramp."""
    fast, slow = betas
    scaling = RopeScaling(
        type="yarn",
        factor=factor,
        original_max_positions=original,
        beta_fast=fast,
        beta_slow=slow,
        mscale=mscale,
        mscale_all_dim=all_dim,
    )
    rope = {"rope_type": "yarn", "rope_theta": theta, "factor": factor, "original_max_position_embeddings": original}
    rope |= {"beta_fast": fast, "beta_slow": slow, "mscale": mscale, "mscale_all_dim": all_dim}
    config = DeepseekV3Config(qk_rope_head_dim=width, rope_parameters=rope, max_position_embeddings=4 * original)
    expected, magnitude = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    freqs = rope_frequencies(width, theta, scaling, torch.device("cpu"))
    torch.testing.assert_close(freqs, expected, rtol=1e-6, atol=0)
    assert rope_magnitude(scaling) == magnitude


@pytest.mark.parametrize("scaling", [None, YARN])
@pytest.mark.parametrize("q_rank", [None, 20])
@torch.no_grad()
def test_absorbed_equals_expanded(q_rank: int | None, scaling: RopeScaling | None) -> None:
    base = latent_config()
    mla = base.mla.model_copy(update={"q_rank": q_rank})
    config = base.model_copy(update={"mla": mla, "rope_scaling": scaling})
    module = random_attention(config)
    x, positions = hidden_states(config)
    whole, past = module(x, view_of(config, positions)), Past()
    prompt = module(x[:, :9], view_of(config, positions[:, :9]), past)
    torch.testing.assert_close(prompt, whole[:, :9], atol=1e-5, rtol=0)
    for t in range(9, 37):
        seen = torch.ones(2, 1, 1, t + 1, dtype=torch.bool)
        one = module(x[:, t : t + 1], view_of(config, positions[:, t : t + 1], seen), past)
        torch.testing.assert_close(one, whole[:, t : t + 1], atol=1e-5, rtol=0)
    assert [tuple(k.shape) for k in past.k[:2]] == [(2, 1, 9, 24 + 8), (2, 1, 1, 24 + 8)]
    assert all(v.numel() == 0 for v in past.v)


@torch.no_grad()
def test_absorbed_with_an_adapter() -> None:
    """The absorbed form takes the weight of `kv_b` apart; an adapter is a part of it."""
    config = latent_config(lora=LoraConfig(rank=3, alpha=2.0, targets=["kv_b"]))
    torch.manual_seed(0)
    model = Decoder(config)
    for p in model.parameters():
        p.fill_(1) if p.dim() == 1 else p.normal_(0, 0.2)
    module = model.layers["0"].attention
    assert (module.kv_b.whole() - module.kv_b.weight).abs().max() > 0.1
    x, positions = hidden_states(config, T=1)
    view = view_of(config, positions)
    torch.testing.assert_close(module(x, view, Past()), module(x, view), atol=1e-5, rtol=0)


@torch.no_grad()
def test_masked_rows() -> None:
    """Packed documents look only at themselves."""
    config = latent_config()
    module = random_attention(config)
    x, _ = hidden_states(config, B=1, T=20)
    positions, segments = torch.cat([torch.arange(8), torch.arange(12)])[None], torch.tensor([[0] * 8 + [1] * 12])
    packed = module(x, view_of(config, positions, attention_mask(segments, None)))
    second = module(x[:, 8:], view_of(config, positions[:, 8:]))
    torch.testing.assert_close(packed[:, 8:], second, atol=1e-6, rtol=0)


@torch.no_grad()
def test_shards_run_unchanged() -> None:
    """Halves of the heads, cut as the plan of tensor parallelism cuts them, add up to the whole; decoding too."""
    config = latent_config()
    whole, halves = random_attention(config), [random_attention(config) for _ in range(2)]
    for rank, half in enumerate(halves):
        for module, dim in ((half.q_b, 0), (half.kv_b, 0), (half.o, 1)):
            module.weight = torch.nn.Parameter(module.weight.chunk(2, dim)[rank].contiguous())
    x, positions = hidden_states(config)
    view = view_of(config, positions)
    torch.testing.assert_close(sum(half(x, view) for half in halves), whole(x, view), atol=1e-5, rtol=0)
    view = view_of(config, positions[:, :1])
    outputs = [module(x[:, :1], view, Past()) for module in (*halves, whole)]
    torch.testing.assert_close(outputs[0] + outputs[1], outputs[2], atol=1e-5, rtol=0)


@pytest.mark.parametrize("q_rank", [None, 20])
def test_shapes_by_arithmetic(q_rank: int | None) -> None:
    base = latent_config()
    config = base.model_copy(update={"mla": base.mla.model_copy(update={"q_rank": q_rank})})
    found = {n.removeprefix("layers.1."): s for n, s in parameter_shapes(config).items() if n.startswith("layers.1.")}
    assert list(found.items()) == list(layer_shapes(config, 1).items())


def test_gradients_flow_to_every_weight() -> None:
    config = latent_config()
    torch.manual_seed(0)
    model = Decoder(config)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1) if p.dim() == 1 else p.normal_(0, 0.1)
    logits = model(torch.arange(12)[None], torch.arange(12)[None])
    logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
