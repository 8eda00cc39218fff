"""Adapters against peft: logits, gradients, the exported directory."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from llmtrain.arch.adapters import adapter_shapes, target_names, without_adapters
from llmtrain.arch.resolve import resolve_model
from llmtrain.checkpoint.adapters import adapter_config, distinguishing, peft_names
from llmtrain.config.schema import LoraConfig, MlaConfig, ModelConfig, MoeConfig
from llmtrain.model.decoder import Decoder, init_tensor, initialize, parameter_shapes, trained_shapes
from llmtrain.model.hf_write import save_hf
from llmtrain.model.lora import merged

SMALL = {"num_layers": 2, "hidden_size": 48, "ffn_size": 80, "num_heads": 6, "vocab_size": 97, "max_positions": 256}
ALL = LoraConfig(rank=4, alpha=6.0, targets=["q", "k", "v", "o", "gate", "up", "down"])
MODELS = {
    "llama": {"num_kv_heads": 2, "lora": ALL},
    "llama, two targets": {"num_kv_heads": 2, "lora": LoraConfig(rank=8, alpha=3.5, targets=["v", "down"])},
    "qwen3": {"family": "qwen3", "num_kv_heads": 2, "head_dim": 16, "lora": ALL},
    "qwen2, biases": {"family": "qwen2", "num_kv_heads": 3, "lora": ALL},
    "gemma3, norms behind": {"family": "gemma3", "num_kv_heads": 2, "head_dim": 16, "sliding_window": 8, "lora": ALL},
    "mixtral, attention": {"family": "mixtral", "num_kv_heads": 2, "lora": LoraConfig(targets=["q", "k", "v", "o"])},
    "deepseek-v3, latents": {
        **{"family": "deepseek-v3", "num_kv_heads": 6, "tie_embeddings": False},
        "mla": MlaConfig(q_rank=16, kv_rank=24, nope_head_dim=8, rope_head_dim=8, v_head_dim=12),
        "moe": MoeConfig(num_experts=4, expert_ffn_size=16, shared_ffn_size=16, dense_layers=[0], balance="none"),
        "lora": LoraConfig(targets=["q_a", "q_b", "kv_a", "kv_b", "o"]),
    },
    "gpt2, transposed": {"family": "gpt2", "num_kv_heads": 6, "lora": LoraConfig(rank=4, targets=["o"])},
}


def model_of(name: str) -> ModelConfig:
    return resolve_model(ModelConfig(init_from=None, **SMALL, **MODELS[name]))


def decoder(config: ModelConfig) -> Decoder:
    """Weights of which logits spread by about 1, biases and norms that are not 0 and 1, adapters that matter."""
    model = Decoder(config)
    initialize(model, config, seed=3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora." not in name:
                p.mul_(3 if p.dim() > 1 else 1).add_(0.05 * torch.randn(p.shape, generator=generator))
            elif name.endswith(".b"):
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def in_peft(model: Decoder, config: ModelConfig, directory: Path) -> nn.Module:
    """Returns the peft model: the base through a Hugging Face directory, the adapters through one of peft."""
    state, base = model.state_dict(), without_adapters(config)
    weights = ((name, state[name]) for name in parameter_shapes(base))
    save_hf(str(directory / "base"), base, weights, torch.float32, None, None)
    plain = AutoModelForCausalLM.from_pretrained(directory / "base", dtype=torch.float32, attn_implementation="eager")
    settings = {
        k: v
        for k, v in adapter_config(config, str(directory / "base")).items()
        if k not in ("peft_type", "inference_mode")
    }
    theirs = peft.get_peft_model(plain.eval(), peft.LoraConfig(**settings))
    tensors = {theirs: state[ours].clone() for ours, theirs in peft_names(config).items()}
    assert not peft.set_peft_model_state_dict(theirs, tensors).unexpected_keys
    return theirs


def inputs(tokens: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(97, (2, tokens), generator=torch.Generator().manual_seed(1))
    return ids, torch.arange(tokens).expand_as(ids)


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_of_peft(name: str, tmp_path: Path) -> None:
    config = model_of(name)
    model, (ids, positions) = decoder(config), inputs()
    theirs = in_peft(model, config, tmp_path)
    ours, expected = model(ids, positions), theirs(ids).logits
    assert expected.std() > 0.3
    assert (ours - expected).abs().max() <= 1e-5
    base = Decoder(without_adapters(config))
    base.load_state_dict({k: v for k, v in model.state_dict().items() if ".lora." not in k})
    assert (base(ids, positions) - expected).abs().max() > 0.05  # the adapters matter
    for logits in (ours, expected):
        (logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])).mean().neg().backward()
    found = dict(theirs.named_parameters())
    trained = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert trained.keys() == peft_names(config).keys() == adapter_shapes(config).keys()
    for name, grad in trained.items():
        expect = found[peft_names(config)[name].replace(".weight", ".default.weight")].grad
        assert (grad - expect).norm() <= 1e-5 * expect.norm(), name


@torch.no_grad()
def test_merged_weights_compute_the_same() -> None:
    config = model_of("llama")
    model, (ids, positions) = decoder(config), inputs()
    state, base = model.state_dict(), without_adapters(config)
    plain = Decoder(base)
    plain.load_state_dict({name: merged(name, config, state.__getitem__) for name in plain.state_dict()})
    assert (plain(ids, positions) - model(ids, positions)).abs().max() <= 1e-5


def test_starts_as_the_base_whatever_the_order() -> None:
    config = model_of("llama")
    shapes = adapter_shapes(config)
    start = {name: init_tensor(name, shape, config, seed=5) for name, shape in reversed(shapes.items())}
    assert all(not start[name].any() for name in shapes if name.endswith(".b"))
    for name, a in start.items():
        if name.endswith(".a"):
            assert a.equal(init_tensor(name, shapes[name], config, seed=5)) and a.abs().max() <= a.size(1) ** -0.5
            assert a.std() == pytest.approx((3 * a.size(1)) ** -0.5, rel=0.2)  # uniform, as peft's
    assert not start["layers.0.attention.q.lora.a"].equal(start["layers.1.attention.q.lora.a"])


def test_only_adapters_are_trained_and_saved() -> None:
    config = model_of("llama, two targets")
    names = [name for name, p in Decoder(config).named_parameters() if p.requires_grad]
    assert names == list(trained_shapes(config)) == list(adapter_shapes(config))
    assert len(names) == 2 * 2 * 2 and trained_shapes(config)["layers.1.feedforward.down.lora.a"] == (8, 80)
    assert trained_shapes(without_adapters(config)) == parameter_shapes(without_adapters(config))


def test_targets_of_a_model() -> None:
    moe = MoeConfig(num_experts=4, expert_ffn_size=16, shared_ffn_size=16)
    assert target_names(model_of("gpt2, transposed")) == ["q", "k", "v", "o", "up", "down"]
    assert target_names(resolve_model(ModelConfig(**SMALL, num_kv_heads=2, moe=moe))) == ["q", "k", "v", "o"]


def test_parts_of_fused_tensors_are_refused() -> None:
    config = model_of("gpt2, transposed")
    fused = config.model_copy(update={"lora": LoraConfig(targets=["q"])})
    with pytest.raises(
        ValueError, match=r"layers.0.attention.q is a part of .*c_attn.weight.*; set export.adapter=false"
    ):
        peft_names(fused)


def test_a_family_that_transformers_lacks_is_refused() -> None:
    palm = resolve_model(ModelConfig(**SMALL, family="palm", lora=LoraConfig()))
    with pytest.raises(ValueError, match=r"family=palm: transformers has no such model"):
        peft_names(palm)


def test_names_distinguish() -> None:
    assert distinguishing(["h.0.attn.c_proj", "h.1.attn.c_proj"], ["h.0.mlp.c_proj", "h.0.mlp.c_fc"]) == ["attn.c_proj"]
    assert distinguishing(["m.0.q_proj", "m.0.v_proj"], ["m.0.k_proj", "m.norm"]) == ["q_proj", "v_proj"]
