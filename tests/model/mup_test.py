"""Checks muP: the table of its factors, no change at the base width, the same function with the factors in the weights,
and its purpose: activations move equally far at every width."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.coordinates import by_width, exponent
from llmtrain.arch.mup import lr_factor, std_factor
from llmtrain.arch.resolve import hf_config, resolve_model
from llmtrain.config.schema import Config, ModelConfig, MoeConfig, MupConfig, OptimConfig
from llmtrain.engine.optim import build_optimizer, set_learning_rate
from llmtrain.model.decoder import Decoder, init_std, init_tensor, initialize, parameter_shapes
from llmtrain.model.hf_write import save_hf
from llmtrain.parallel.placement import Placement
from llmtrain.rollout.native import NativeGenerator
from llmtrain.rules.check import violations
from llmtrain.types import Prompt, Sampling

SHAPE = {"num_layers": 2, "hidden_size": 32, "ffn_size": 48, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 64}
MOE = MoeConfig(num_experts=4, top_k=2, expert_ffn_size=16)


def model_of(base: int | None, **fields: object) -> ModelConfig:
    mup = None if base is None else MupConfig(base_hidden=base, base_head_dim=base // 4)
    return resolve_model(ModelConfig(**{**SHAPE, "max_positions": 64, **fields}, mup=mup))


def test_factors_of_table_8_at_four_times_the_width() -> None:
    """The factors of (initial std, lr) are the table's; depth scaling stays."""
    model = model_of(8, family="mixtral", moe=MOE)
    shapes = parameter_shapes(model)
    expected = {
        "embed.weight": (0.02, 1),
        "norm.weight": (None, 1),
        "layers.0.attention_norm.weight": (None, 1),
        "layers.0.attention.q.weight": (0.02 / 2, 1 / 4),
        "layers.1.attention.o.weight": (0.02 / 2 / 2, 1 / 4),
        "layers.0.feedforward.experts.up": (0.02 / 2, 1 / 4),
        "layers.0.feedforward.router.weight": (0.02 / 4, 1 / 4),
    }
    for name, (std, factor) in expected.items():
        assert lr_factor(name, shapes[name], model) == factor, name
        assert std is None or init_std(name, shapes[name], model) == pytest.approx(std), name


def test_a_family_is_asked_for_its_scale_at_the_base() -> None:
    """GPT-2's positions are an input; a scale that already follows the fan-in is not divided twice."""
    gpt2 = model_of(8, family="gpt2")
    assert init_std("position_embed.weight", (64, 32), gpt2) == 0.01
    palm = model_of(8, family="palm", scale_embeddings=False)
    assert init_std("layers.0.attention.q.weight", (32, 32), palm) == pytest.approx(32**-0.5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_nothing_changes_at_the_base_width(family: str) -> None:
    models = [Decoder(model_of(base, family=family)) for base in (None, 32)]
    for model in models:
        initialize(model, model.config, seed=1)
    ids = torch.arange(20)[None]
    assert torch.equal(*(model(ids, ids) for model in models))
    for name, p in models[0].named_parameters():
        assert torch.equal(p, models[1].get_parameter(name)), name
        assert std_factor(name, p.shape, models[1].config) == lr_factor(name, p.shape, models[1].config) == 1


def test_groups_of_the_optimizer() -> None:
    config = model_of(8)
    model = Decoder(config)
    for name, p in model.named_parameters():
        p.placement = Placement(name, tuple(p.shape), lr_factor=lr_factor(name, p.shape, config))
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.1))
    set_learning_rate(optimizer.param_groups, 0.4)
    found = {p.placement.name: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert found["embed.weight"] == (0.4, 0.1) and found["norm.weight"] == (0.4, 0.0)
    assert found["layers.1.feedforward.up.weight"] == pytest.approx((0.1, 0.4))  # their product stays
    assert len(optimizer.param_groups) == 3


@pytest.mark.parametrize(
    "fields",
    [
        {"family": "llama"},
        {"family": "llama", "tie_embeddings": False},
        {"family": "gpt2", "num_kv_heads": 4},
        {"family": "qwen3", "head_dim": 12},
        {"family": "mixtral", "moe": MOE},
    ],
    ids=lambda fields: " ".join(map(str, fields)),
)
@torch.no_grad()
def test_export_has_the_factors_in_the_weights(fields: dict, tmp_path: Path) -> None:
    config = model_of(8, **fields)
    torch.manual_seed(0)
    model = Decoder(config).eval()
    for p in model.parameters():
        p.copy_(torch.randn(p.shape) * 0.4 if p.dim() > 1 else 1 + torch.rand(p.shape))
    weights = ((name, x) for name, x in model.state_dict().items())
    save_hf(str(tmp_path / "out"), config, weights, torch.float32, None, None)
    ids = torch.randint(0, 64, (2, 20))
    ours = model(ids, torch.arange(20).expand_as(ids))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(ids).logits
    assert ours.std() > 0.1 and (ours - theirs).abs().max() < 1e-5
    with pytest.raises(ValueError, match=r"model\.mup=.*cannot say so"):
        hf_config(config)


def test_the_generator_has_the_factors_too() -> None:
    config = model_of(8)
    model = Decoder(config).eval()
    shapes = parameter_shapes(config)
    generator = NativeGenerator(Decoder(config), max_batch_seqs=2, device="cpu")
    weights = {name: 8 * init_tensor(name, shape, config, 0) for name, shape in shapes.items()}
    generator.load_weights(weights.items(), version=1)
    model.load_state_dict(weights | {"head.weight": weights["embed.weight"]})
    ((sample,),) = generator.generate([Prompt([1, 2, 3], seed=0)], Sampling(10, temperature=1.0))
    ids = torch.tensor([sample.prompt_ids + sample.ids])
    logp, _ = model(ids[:, :-1], torch.arange(ids.size(1) - 1)[None], labels=ids[:, 1:])
    assert torch.allclose(logp[0, 2:], torch.tensor(sample.logprobs), atol=1e-5)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"model": {"scale_embeddings": True}}, "not with model.scale_embeddings=true, its factor grows"),
        ({"model": {"mtp_layers": 1}}, "not with model.mtp_layers, set mtp_layers=0"),
        ({"model": {"lora": {}}}, "not with model.lora, export the model"),
        ({"model": {"attention": "mla", "mla": {}}}, "not with model.attention=mla"),
        ({"model": {"attention_scale": 0.1}}, "base_head_dim=2: model.attention_scale is set too; remove one"),
        ({"optim": {"name": "muon"}}, "not with optim.name=muon"),
    ],
)
def test_what_does_not_go_with_it(keys: dict, expected: str) -> None:
    mup = {"mup": {"base_hidden": 8, "base_head_dim": 2}}
    config = Config.model_validate({**keys, "model": {**SHAPE, **keys.get("model", {}), **mup}})
    lines = [line for line in violations(config, 1, "pretrain") if "model.mup" in line]
    assert len(lines) == 1 and expected in lines[0], lines


def test_activations_move_equally_far_at_every_width() -> None:
    """The coordinate check (appendix D.1) runs on widths 32 to 128. Seen with muP: exponents of -0.2 to 0.15; without:
    0.8 for the logits, more within blocks."""
    widths = (32, 64, 128)
    flat, grown = (by_width(widths, mup, steps=3, lr=0.003, seeds=2, layers=2) for mup in (True, False))
    for place, values in flat.items():
        assert abs(exponent(widths, values)) < 0.3, (place, values)
        assert exponent(widths, grown[place]) > 0.35, (place, grown[place])
    assert [values[0] for values in flat.values()] == [values[0] for values in grown.values()]  # the base is the same
