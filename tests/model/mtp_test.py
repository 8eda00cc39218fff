"""Checks multi-token prediction: its gradient against both losses written out, and its place on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import DeepseekV3Config
from transformers.modeling_layers import MtpLayer
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3DecoderLayer,
    DeepseekV3RMSNorm,
    DeepseekV3RotaryEmbedding,
)

from llmtrain.arch.families import family_of, presets
from llmtrain.arch.parameters import kind_of, mtp_shapes, numel
from llmtrain.arch.resolve import hf_config, parameter_count, resolve_model
from llmtrain.config.recipes import config_class
from llmtrain.config.schema import Config, MlaConfig, ModelConfig, MoeConfig
from llmtrain.model.decoder import Decoder, parameter_shapes
from llmtrain.model.hf_write import save_hf
from llmtrain.model.mtp import Rows
from llmtrain.parallel.logprob import ScoringHead
from llmtrain.rules.check import violations
from llmtrain.types import IGNORE
from tests.model.families import read_decoder

MLA = MlaConfig(q_rank=12, kv_rank=8, nope_head_dim=6, rope_head_dim=4, v_head_dim=6)
MOE = {"num_experts": 4, "expert_ffn_size": 16, "shared_ffn_size": 16, "dense_layers": [0]}
V3_MOE = MoeConfig(**MOE, gate="sigmoid", selection_bias=True, balance="bias")
SHAPE = {"num_layers": 2, "hidden_size": 32, "ffn_size": 48, "num_heads": 4, "num_kv_heads": 4, "vocab_size": 61}
FAMILIES = {
    "llama": {},
    "deepseek-v3": {"mla": MLA, "moe": V3_MOE},
    "gemma3": {"head_dim": 8, "sliding_window": 4},
}


def model_config(family: str = "deepseek-v3", mtp_layers: int = 2, **changes: object) -> ModelConfig:
    return resolve_model(
        ModelConfig(family=family, mtp_layers=mtp_layers, mtp_coef=0.4, **{**SHAPE, **FAMILIES[family], **changes})
    )


def decoder(config: ModelConfig, seed: int = 0) -> Decoder:
    model = Decoder(config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for x in model.state_dict().values():
            x.normal_(0, 0.1) if x.dim() > 1 else x.copy_(torch.linspace(0.5, 1.5, x.numel()))
    return model


LENGTHS = (9, 2, 6)  # documents of a row, and one place of padding


def packed() -> tuple[Tensor, dict[str, Tensor]]:
    """Returns two rows of documents; in one a label is not trained."""
    T = sum(LENGTHS) + 1
    tokens = torch.randint(61, (2, T + 1), generator=torch.Generator().manual_seed(3))
    ids, labels = tokens[:, :-1], tokens[:, 1:].clone()
    segments = torch.tensor([s for s, n in enumerate(LENGTHS) for _ in range(n)] + [-1]).expand(2, T)
    positions = torch.tensor([t for n in LENGTHS for t in range(n)] + [0]).expand(2, T)
    labels[:, -1], labels[1, 4] = IGNORE, IGNORE
    return ids, {"positions": positions, "segment_ids": segments, "labels": labels}


def explicit(model: Decoder, ids: Tensor, row: dict[str, Tensor]) -> tuple[Tensor, list[Tensor], list[int]]:
    """Returns the sum of the token losses, and for each depth of multi-token prediction the sum and number of losses.

    They are computed document by document, with whole logits, on no longer a sequence than has the embeddings.
    """
    main, further, counts = torch.zeros(()), [torch.zeros(()) for _ in model.mtp], [0 for _ in model.mtp]
    trunk = Decoder.__new__(Decoder)
    trunk.__dict__.update(model.__dict__)
    trunk._modules = {**model._modules, "head": None}
    for b in range(ids.size(0)):
        start = 0
        for n in LENGTHS:
            here = slice(start, start + n)
            tokens, labels, start = ids[b, here], row["labels"][b, here], start + n
            positions = torch.arange(n)[None]
            hidden = trunk(tokens[None], positions)
            main = main + F.cross_entropy(model.head(hidden)[0], labels, ignore_index=IGNORE, reduction="sum")
            follow = torch.where(labels == IGNORE, torch.cat([tokens[1:], tokens[:1]]), labels)
            for depth, module in enumerate(model.mtp.values(), 1):
                keep = n - depth + 1  # of these the token `depth` on is known
                if keep < 1:
                    break
                views = model.views(hidden.dtype, positions[:, :keep], None, None, None)
                joined = torch.cat(
                    [
                        module.embed_norm(model.embedded(follow[None, depth - 1 :], positions[:, :keep])),
                        module.hidden_norm(hidden[:, :keep]),
                    ],
                    -1,
                )
                hidden = module.norm(module.block(F.linear(joined, module.proj.weight), views[module.block.kind]))
                for t in range(n - depth):
                    if (labels[t : t + depth + 1] != IGNORE).all():
                        logp = model.head(hidden[:, t]).log_softmax(-1)
                        further[depth - 1] = further[depth - 1] - logp[0, labels[t + depth]]
                        counts[depth - 1] += 1
    return main, further, counts


def gradients(model: Decoder, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_equals_both_losses_written_out(family: str, chunked: bool) -> None:
    model, (ids, row) = decoder(model_config(family)), packed()
    denominator = 7.0
    main, further, counts = explicit(model, ids, row)
    expected = gradients(model, (main + 0.4 * sum(further) / 2) / denominator)
    assert counts[0] > counts[1] > 0
    if chunked:
        model.head.__class__ = ScoringHead
        model.head.group, model.head.first_id, model.head.chunk_tokens = None, 0, 5
    model.mtp.loss_factor = 1 / denominator
    logp, _ = model(ids, **row)
    assert -logp.sum().item() == pytest.approx(main.item(), rel=1e-5)
    got = gradients(model, -logp.sum() / denominator)
    assert got.keys() == expected.keys() == dict(model.named_parameters()).keys()
    largest = max(x.abs().max() for x in expected.values())
    for name, x in expected.items():
        assert (got[name] - x).abs().max() <= 1e-4 * x.abs().max() + 1e-6 * largest, name
    assert model.mtp.sum.item() == pytest.approx(sum(x.item() for x in further), rel=1e-5)
    assert model.mtp.tokens.item() == sum(counts)
    model.mtp.reset()
    assert model.mtp.sum is None


def test_nothing_without_a_factor_or_a_gradient() -> None:
    model, (ids, row) = decoder(model_config()), packed()
    plain = model(ids, **row)[0]
    plain.sum().backward()
    assert all(p.grad is None for p in model.mtp.parameters()) and model.mtp.sum is None
    model.mtp.loss_factor = 1.0
    with torch.no_grad():
        assert torch.equal(model(ids, **row)[0], plain)
    assert torch.equal(model(ids, **row)[0], plain) and model.mtp.sum is None  # counted in the backward


def test_microbatches_add_up() -> None:
    model, (ids, row) = decoder(model_config()), packed()
    model.mtp.loss_factor = 0.1
    model(ids, **row)[0].sum().backward()
    whole, tokens = model.mtp.sum, model.mtp.tokens
    model.mtp.reset()
    for b in range(2):
        model(ids[b : b + 1], **{name: x[b : b + 1] for name, x in row.items()})[0].sum().backward()
    assert model.mtp.sum.item() == pytest.approx(whole.item(), rel=1e-5) and model.mtp.tokens == tokens


def test_targets() -> None:
    labels = torch.tensor([[5, 6, 7, IGNORE, 9, 3, 4]])
    segments = torch.tensor([[0, 0, 0, 0, 0, 1, 1]])
    rows = Rows(torch.tensor([[1, 5, 6, 7, 8, 2, 3]]), labels, segments)
    x = IGNORE
    assert rows.targets(1).tolist() == [[6, 7, x, x, x, 4, x]]
    assert rows.targets(2).tolist() == [[7, x, x, x, x, x, x]]
    assert rows.targets(9).tolist() == [[x] * 7]
    assert rows.following(1).tolist() == [[5, 6, 7, 8, 9, 3, 4]]
    assert rows.following(3).tolist() == [[7, 8, 9, 3, 4, 0, 0]]
    assert rows._replace(segment_ids=None).targets(1).tolist() == [[6, 7, x, x, 3, 4, x]]


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_by_arithmetic(family: str) -> None:
    config = model_config(family)
    shapes = parameter_shapes(config)
    own = {name: shape for name, shape in shapes.items() if name.startswith("mtp.")}
    assert list(own.items()) == list(mtp_shapes(config).items())
    assert all(kind_of(name.rpartition(".")[0]) for name in own)
    assert parameter_count(config) == parameter_count(config.model_copy(update={"mtp_layers": 0}))


def test_published_size() -> None:
    """DeepSeek-V3's one module has 14B with the copies of embedding and head in its files, 684.5B in all."""
    assert "deepseek-v3" in presets()
    config = resolve_model(ModelConfig(preset="deepseek-v3", mtp_layers=1))
    copies = 2 * config.vocab_size * config.hidden_size
    module = numel(mtp_shapes(config).values()) + copies
    assert module / 1e9 == pytest.approx(14, rel=0.05)
    assert (parameter_count(config) + module) / 1e9 == pytest.approx(684.5, abs=0.1)


def written(config: ModelConfig, folder: Path) -> tuple[Decoder, dict[str, Tensor]]:
    model = decoder(config)
    save_hf(str(folder), config, model.state_dict().items(), torch.float32, None, None)
    return model, load_file(folder / "model.safetensors")


def test_names_on_disk(tmp_path: Path) -> None:
    config = model_config(mtp_layers=1, num_layers=3)
    model, stored = written(config, tmp_path / "hf")
    mtp, theirs = model.mtp["0"], "model.layers.3"
    expected = {
        "enorm.weight": mtp.embed_norm.weight,
        "hnorm.weight": mtp.hidden_norm.weight,
        "eh_proj.weight": mtp.proj.weight,
        "shared_head.norm.weight": mtp.norm.weight,
        "shared_head.head.weight": model.head.weight,
        "embed_tokens.weight": model.embed.weight,
        "self_attn.kv_b_proj.weight": mtp.block.attention.kv_b.weight,
        "mlp.gate.e_score_correction_bias": mtp.block.feedforward.router.bias,
        "mlp.experts.2.up_proj.weight": mtp.block.feedforward.experts.up[2],
        "post_attention_layernorm.weight": mtp.block.feedforward_norm.weight,
    }
    assert all(torch.equal(stored[f"{theirs}.{name}"], x) for name, x in expected.items())
    assert hf_config(config)["num_nextn_predict_layers"] == 1


@torch.no_grad()
def test_a_depth_equals_transformers() -> None:
    """Its `MtpLayer` with our weights: what is normed, the order of the projection's inputs, what is passed on."""
    config = model_config(mtp_layers=1, num_layers=3, rope_scaling=None)
    model = decoder(config)
    ours, described = model.mtp["0"], DeepseekV3Config(**{**hf_config(config), "attn_implementation": "eager"})
    theirs = MtpLayer(described, DeepseekV3DecoderLayer, DeepseekV3RMSNorm, config.num_layers)
    names = {"embed_norm": "enorm", "hidden_norm": "hnorm", "proj": "eh_proj", "norm": "post_norm"}
    state = {f"{theirs}.weight": getattr(ours, name).weight for name, theirs in names.items()}
    block = {name.removeprefix("layers.*."): theirs for name, theirs in family_of("deepseek-v3").modules.items()}
    for name, x in ours.block.state_dict().items():
        module, _, leaf = name.rpartition(".")
        if name not in block and module in block:
            state[f"{block[module].replace('model.layers.*', 'mtp_block')}.{leaf}"] = x
    feed = ours.block.feedforward
    state["mtp_block.mlp.gate.e_score_correction_bias"] = feed.router.bias
    state["mtp_block.mlp.experts.gate_up_proj"] = torch.cat([feed.experts.gate, feed.experts.up], 1)
    state["mtp_block.mlp.experts.down_proj"] = feed.experts.down
    theirs.load_state_dict(state)
    hidden, embedded, positions = torch.randn(2, 11, 32), torch.randn(2, 11, 32), torch.arange(11).expand(2, 11)
    angles = DeepseekV3RotaryEmbedding(described)(hidden, positions)
    causal = torch.full((11, 11), float("-inf")).triu(1)[None, None]
    expected = theirs(embedded, hidden, angles, causal, positions, None)
    view = model.views(torch.float32, positions, None, None, None)["full"]
    assert expected.std() > 0.3
    assert (ours(hidden, embedded, view) - expected).abs().max() <= 1e-5


def test_read_with_and_without(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    model, _ = written(model_config(mtp_layers=2), folder)
    for asked in (0, 1, 2):
        config = resolve_model(ModelConfig(init_from=str(folder), mtp_layers=asked))
        own, read = model.state_dict(), read_decoder(folder, config).state_dict()
        assert len([name for name in own if name not in read]) == len(own) - len(read)
        assert all(torch.equal(own[name], x) for name, x in read.items())
        assert sum(name.endswith("proj.weight") for name in read) == asked
    assert resolve_model(ModelConfig(init_from=str(folder))).mtp_layers == 0
    with pytest.raises(ValueError, match=r"model\.layers\.4\..* is missing"):
        read_decoder(folder, resolve_model(ModelConfig(init_from=str(folder), mtp_layers=3)))


def test_other_families_have_no_names_for_them(tmp_path: Path) -> None:
    config = model_config("llama")
    with pytest.raises(ValueError, match=r"model\.mtp_layers=2: family llama has no names"):
        save_hf(str(tmp_path / "hf"), config, decoder(config).state_dict().items(), torch.float32, None, None)
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("command", "model", "parallel", "expected"),
    [
        ("sft", {}, {}, "not with sft, only pretrain"),
        ("grpo", {}, {}, "not with grpo, only pretrain"),
        ("pretrain", {}, {"pp": 2}, "not with parallel.pp=2"),
        ("pretrain", {}, {"cp": 2}, "not with parallel.cp=2"),
        ("pretrain", {"positions": "learned"}, {}, "not with model.positions=learned"),
        ("pretrain", {"lora": {}}, {}, "not with model.lora"),
        ("export", {}, {}, "not with model.family=llama on disk"),
    ],
)
def test_refused(command: str, model: dict, parallel: dict, expected: str) -> None:
    config = config_class()(model=ModelConfig(mtp_layers=1, **model), parallel={"dp_shard": -1, **parallel})
    lines = [line for line in violations(config, 2, command) if "mtp_layers" in line]
    assert len(lines) == 1 and lines[0].startswith("model.mtp_layers=1: ") and expected in lines[0], lines
    assert not [line for line in violations(Config(model=ModelConfig(mtp_layers=1)), 1, "pretrain") if "mtp" in line]
