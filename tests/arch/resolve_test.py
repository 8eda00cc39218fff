"""Presets have the published sizes; shapes survive config.json in both of its forms."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.arch.families import presets
from llmtrain.arch.resolve import (
    SHAPE,
    fields_from_hf,
    hf_config,
    parameter_count,
    resolve_model,
    train_flops_per_token,
)
from llmtrain.config.load import dump, load
from llmtrain.config.schema import Config, ModelConfig, RopeScaling


def of(family: str) -> list[str]:
    """Its presets."""
    return [name for name, fields in presets().items() if fields["family"] == family]


PUBLISHED = {  # preset -> parameters and how far they may be off: None = not at all, else a rounded number of a paper
    # elements of the safetensors of the released models, as their pages show them
    "llama2-7b": (6_738_415_616, None),
    "llama2-13b": (13_015_864_320, None),
    "llama2-70b": (68_976_648_192, None),
    "llama3-8b": (8_030_261_248, None),
    "llama3-70b": (70_553_706_496, None),
    "llama3-405b": (405_853_388_800, None),
    "llama3.1-8b": (8_030_261_248, None),
    "llama3.1-70b": (70_553_706_496, None),
    "llama3.1-405b": (405_853_388_800, None),
    "smollm2-135m": (134_515_008, None),
    "gpt2": (124_439_808, None),
    "gpt2-medium": (354_823_168, None),
    "gpt2-large": (774_030_080, None),
    "gpt2-xl": (1_557_611_200, None),
    "qwen2-0.5b": (494_032_768, None),
    "qwen2-1.5b": (1_543_714_304, None),
    "qwen2-7b": (7_615_616_512, None),
    "qwen2-72b": (72_706_203_648, None),
    "qwen2.5-3b": (3_085_938_688, None),
    "qwen2.5-14b": (14_770_033_664, None),
    "qwen2.5-32b": (32_763_876_352, None),
    "qwen3-0.6b": (596_049_920, None),
    "qwen3-1.7b": (1_720_574_976, None),
    "qwen3-4b": (4_022_468_096, None),
    "qwen3-8b": (8_190_735_360, None),
    "qwen3-14b": (14_768_307_200, None),
    "qwen3-32b": (32_762_123_264, None),
    "gemma2-2b": (2_614_341_888, None),
    "gemma2-9b": (9_241_705_984, None),
    "gemma2-27b": (27_227_128_320, None),
    "gemma3-270m": (268_098_176, None),
    "gemma3-1b": (999_885_952, None),
    # arXiv 2503.19786, table 1: embedding + non-embedding; the embedding's column holds the vision projection too
    "gemma3-4b": (675e6 + 3209e6, 4e6),
    "gemma3-12b": (1012e6 + 10759e6, 6e6),
    "gemma3-27b": (1416e6 + 25600e6, 8e6),
    # arXiv 2005.14165, table D.1 (in millions)
    "gpt3-125m": (125e6, 0.5e6),
    "gpt3-350m": (356e6, 0.5e6),
    "gpt3-760m": (760e6, 0.5e6),
    "gpt3-1.3b": (1320e6, 5e6),
    "gpt3-2.7b": (2650e6, 5e6),
    "gpt3-6.7b": (6660e6, 5e6),
    "gpt3-13b": (12850e6, 5e6),
    "gpt3-175b": (174_600e6, 50e6),
    # arXiv 2204.02311, table 1 (in billions, cut after two digits)
    "palm-8b": (8.63e9, 0.01e9),
    "palm-62b": (62.50e9, 0.01e9),
    "palm-540b": (540.35e9, 0.01e9),
}
DENSE = [name for family in ("llama", "gpt2", "palm", "qwen2", "qwen3", "gemma2", "gemma3") for name in of(family)]


@pytest.mark.parametrize("preset", DENSE)
def test_presets_have_the_published_parameter_counts(preset: str) -> None:
    count, slack = PUBLISHED[preset]
    assert abs(parameter_count(ModelConfig(preset=preset)) - count) <= (slack or 0)


@pytest.mark.parametrize("preset", [name for name in DENSE if not name.startswith("palm")])
def test_presets_survive_config_json(preset: str) -> None:
    model = resolve_model(ModelConfig(preset=preset))
    assert fields_from_hf(hf_config(model)) == {name: getattr(model, name) for name in SHAPE}


def test_training_flops_of_palm_540b() -> None:
    """Appendix B, table 3: 46.2 % of the peak (275 TFLOP/s) of 6,144 chips at 238.3 thousand tokens a second, with
    attention over the whole row where ours counts what causal attention needs."""
    layers, heads, head_dim, seq_len = 118, 48, 256, 2048
    beyond = 12 * layers * heads * head_dim * (seq_len - 1) / 2
    theirs = train_flops_per_token(ModelConfig(preset="palm-540b"), seq_len) + beyond
    assert theirs * 238.3e3 / (6144 * 275e12) == pytest.approx(0.462, abs=5e-4)


TRAININGS = [  # preset, tokens, FLOPs of the whole training as published; the keys a query has in it, and how many rows
    # of tables that are only looked up it multiplies by 6 like the rest
    # arXiv 2005.14165, table D.1: 6 N, without attention; N has the 2,048 learned positions
    ("gpt3-125m", 300e9, 2.25e20, 0, 2048),
    ("gpt3-350m", 300e9, 6.41e20, 0, 2048),
    ("gpt3-760m", 300e9, 1.37e21, 0, 2048),
    ("gpt3-1.3b", 300e9, 2.38e21, 0, 2048),
    ("gpt3-2.7b", 300e9, 4.77e21, 0, 2048),
    ("gpt3-6.7b", 300e9, 1.20e22, 0, 2048),
    ("gpt3-13b", 300e9, 2.31e22, 0, 2048),
    ("gpt3-175b", 300e9, 3.14e23, 0, 2048),
    # arXiv 2204.02311, table 22: 6 N + 12 layers x heads x head_dim x row; the embedding is the head too
    ("palm-8b", 780e9, 4.29e22, 2048, 0),
    ("palm-62b", 795e9, 3.08e23, 2048, 0),
    ("palm-540b", 780e9, 2.56e24, 2048, 0),
    # arXiv 2407.21783, section 1: no formula, but 6 N it is; attention on rows of 8,192 would add 4 %
    ("llama3-405b", 15.6e12, 3.8e25, 0, 128256),
]


@pytest.mark.parametrize(("preset", "tokens", "published", "keys", "looked_up"), TRAININGS)
def test_published_training_flops(preset: str, tokens: float, published: float, keys: int, looked_up: int) -> None:
    """Within 0.5 %: N was rounded to three digits before, in table D.1."""
    m, seq_len = resolve_model(ModelConfig(preset=preset)), 2048
    assert m.head_dim is not None
    of_a_key = 12 * m.num_layers * m.num_heads * m.head_dim  # 2 products, 3 x 2 FLOPs an element
    theirs = train_flops_per_token(m, seq_len) + of_a_key * (keys - (seq_len + 1) / 2) + 6 * looked_up * m.hidden_size
    assert theirs * tokens == pytest.approx(published, rel=0.005)


def windows(preset: str, layers: int) -> list[int]:
    """Tokens that each layer sees (10^9: all), as arXiv 2408.00118 and 2503.19786 and the released files have it."""
    everything = 10**9
    if preset.startswith("gemma2"):
        return [4096 if layer % 2 == 0 else everything for layer in range(layers)]
    if preset.startswith("gemma3"):
        window = 512 if preset in ("gemma3-270m", "gemma3-1b") else 1024
        return [window if layer % 6 < 5 else everything for layer in range(layers)]
    return [everything] * layers


def grouped(x: tuple[int, ...], weight: tuple[int, ...], *_: object, **__: object) -> int:
    """FLOPs of `grouped_product`: every row has one matrix."""
    return 2 * x[0] * weight[1] * weight[2]


def outer(y: tuple[int, ...], x: tuple[int, ...], *_: object, **__: object) -> int:
    """FLOPs of `grouped_outer`."""
    return 2 * y[0] * y[1] * x[1]


def counted(model: ModelConfig) -> tuple[int, int, int]:
    """FLOPs that torch counts in forward and backward of one token: of products with weights, and of attention; and
    the elements of norms and biases. Layers behind the dense ones are alike: one is there and stands for all."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from llmtrain.model.decoder import Decoder

    ops, last = torch.ops.llmtrain, len(model.moe.dense_layers) if model.moe else 0
    with torch.device("meta"):
        decoder = Decoder(model.model_copy(update={"num_layers": last + 1}))
        ids = torch.zeros(1, 1, dtype=torch.int64)
    formulas = {ops.grouped_product: grouped, ops.grouped_outer: outer}
    with FlopCounterMode(display=False, custom_mapping=formulas) as mode:
        decoder(ids, ids).sum().backward()
    counts, more = mode.get_flop_counts(), model.num_layers - last - 1
    found = Counter(counts["Global"])
    for op, flops in counts[f"Decoder.layers.{last}"].items():
        found[op] += more * flops
    attention = found.pop(torch.ops.aten.bmm)
    parameters = [*decoder.parameters(), *[*decoder.layers[str(last)].parameters()] * more]
    return sum(found.values()), attention, sum(p.numel() for p in parameters if p.dim() == 1)


@pytest.mark.parametrize("preset", presets())
def test_training_flops_are_those_of_the_decoder(preset: str) -> None:
    """Only the chosen experts multiply, and the one token that is computed sees one key. Norms and biases, which have
    no product, are parameters like others to the usual 6 N."""
    model = resolve_model(ModelConfig(preset=preset))
    products, attention, vectors = counted(model)
    for seq_len in (256, 8192):
        seen = windows(preset, model.num_layers)
        keys = {window: sum(min(i + 1, window) for i in range(seq_len)) / seq_len for window in set(seen)}
        expected = products + 6 * vectors + attention * sum(keys[window] for window in seen) / model.num_layers
        assert train_flops_per_token(model, seq_len) == pytest.approx(expected, rel=1e-12)


def test_the_count_is_that_of_the_decoder() -> None:
    from llmtrain.model.decoder import parameter_shapes

    for tied in (True, False):
        model = ModelConfig(num_kv_heads=2, head_dim=48, tie_embeddings=tied)
        shapes = parameter_shapes(model).values()
        assert parameter_count(model) == sum(s[0] * (s[1] if len(s) == 2 else 1) for s in shapes)


def test_written_fields_win_over_a_preset_and_resolving_is_idempotent(tmp_path: Path) -> None:
    model = resolve_model(ModelConfig(preset="llama3.1-8b", num_layers=2, num_heads=16))
    assert (model.num_layers, model.hidden_size, model.head_dim) == (2, 4096, 256)
    assert model.rope_scaling == RopeScaling() and model.max_positions == 131072
    assert resolve_model(model) == model
    (tmp_path / "config.yaml").write_text(dump(Config(model=model)))
    assert load(str(tmp_path / "config.yaml"), []).model == model


def test_unknown_preset_and_double_source() -> None:
    with pytest.raises(ValueError, match=r"model.preset=llama9: is not known; choose one of llama2-7b, "):
        resolve_model(ModelConfig(preset="llama9"))
    with pytest.raises(ValueError, match=r"remove model.preset"):
        resolve_model(ModelConfig(preset="llama3-8b", init_from="x"))


def test_weights_give_the_shape_and_may_not_be_contradicted(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(hf_config(ModelConfig(preset="smollm2-135m"))))
    model = resolve_model(ModelConfig(init_from=str(tmp_path), num_layers=30))
    assert {n: getattr(model, n) for n in presets()["smollm2-135m"]} == presets()["smollm2-135m"]
    with pytest.raises(ValueError) as caught:
        resolve_model(ModelConfig(init_from=str(tmp_path), num_layers=3, tie_embeddings=False))
    assert str(caught.value).splitlines() == [
        f"model.num_layers=3: the weights in {tmp_path} have 30; remove the line",
        f"model.tie_embeddings=False: the weights in {tmp_path} have True; remove the line",
    ]


def test_a_run_directory_gives_the_shape_through_its_own_source(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    (first / "config.yaml").write_text(dump(Config(model=ModelConfig(num_layers=3, vocab_size=77))))
    (second / "config.yaml").write_text(dump(Config(model=ModelConfig(init_from=str(first)))))
    model = resolve_model(ModelConfig(init_from=str(second)))
    assert (model.num_layers, model.vocab_size, model.head_dim) == (3, 77, 32)
    (second / "config.yaml").write_text(dump(Config(model=resolve_model(ModelConfig(init_from=str(first))))))
    (first / "config.yaml").unlink()  # a resolved dump does not need it any more
    assert resolve_model(ModelConfig(init_from=str(second))).num_layers == 3


def test_a_scalar_head_is_new_on_a_language_model_and_unties_it(tmp_path: Path) -> None:
    with open(tmp_path / "config.json", "w") as file:
        json.dump(hf_config(ModelConfig(hidden_size=64, tie_embeddings=True)), file)
    start = str(tmp_path)
    scalar = resolve_model(ModelConfig(init_from=start, head="scalar"))
    assert (scalar.head, scalar.tie_embeddings, scalar.hidden_size) == ("scalar", False, 64)
    assert resolve_model(scalar) == resolve_model(ModelConfig(init_from=start, head="scalar", tie_embeddings=False))
    language = resolve_model(ModelConfig(init_from=start))
    assert (language.head, language.tie_embeddings) == ("lm", True)
    with pytest.raises(ValueError, match=r"^model.tie_embeddings=true: not with model.head=scalar, .*; remove it"):
        resolve_model(ModelConfig(init_from=start, head="scalar", tie_embeddings=True))
    with pytest.raises(ValueError, match=r"^model.tie_embeddings=False: the weights in .* have True; remove the line$"):
        resolve_model(ModelConfig(init_from=start, tie_embeddings=False))


def test_a_scalar_head_that_is_there_is_taken_and_not_contradicted() -> None:
    earlier = {"runs/reward": resolve_model(ModelConfig(head="scalar", num_layers=2))}
    for more in ({}, {"head": "scalar"}):
        found = resolve_model(ModelConfig(init_from="runs/reward", **more), earlier)
        assert (found.head, found.tie_embeddings, found.num_layers) == ("scalar", False, 2)
    with pytest.raises(ValueError, match=r"^model.head=lm: the weights in runs/reward have scalar; remove the line$"):
        resolve_model(ModelConfig(init_from="runs/reward", head="lm"), earlier)


def test_a_run_from_before_heads_were_chosen_needs_no_sources() -> None:
    fields = resolve_model(ModelConfig()).model_dump() | {"init_from": "runs/gone"}
    fields.pop("head")
    assert resolve_model(ModelConfig.model_validate(fields)).head == "lm"


def test_unusable_weights_are_named(tmp_path: Path) -> None:
    def fault() -> str:
        with pytest.raises(ValueError) as caught:
            resolve_model(ModelConfig(init_from=str(tmp_path)))
        return str(caught.value)

    assert "has neither config.json (Hugging Face) nor config.yaml (a run)" in fault()
    (tmp_path / "config.yaml").write_text("stages: [{name: a, command: data}]\n")
    assert "is a run of several stages; give the directory of one" in fault()
    (tmp_path / "config.json").write_text('{\n"a" 1}')
    assert f"{tmp_path}/config.json:2: broken JSON" in fault()


def test_a_stage_before_gives_the_shape_of_weights_that_do_not_exist_yet() -> None:
    earlier = {"runs/q/pretrain": resolve_model(ModelConfig(num_layers=7))}
    assert resolve_model(ModelConfig(init_from="runs/q/pretrain/"), earlier).num_layers == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bert"}, "model_type=bert: is not known; use a model of one of .*llama"),
        ({"attention_bias": True}, "attention_bias=True: only False is supported"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu: only silu"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1.0}}, "rope_type=dynamic"),
        ({"hidden_size": None}, "hidden_size=None: is missing or no positive whole number"),
    ],
)
def test_what_the_decoder_does_not_compute_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fields_from_hf({**hf_config(ModelConfig()), **change})


def test_the_old_and_the_new_rope_form_read_alike() -> None:
    model = ModelConfig(preset="llama3.1-8b")
    new = hf_config(model)
    assert new["rope_parameters"]["rope_theta"] == new["rope_theta"] == 500000.0
    old = {k: v for k, v in new.items() if k != "rope_parameters"}
    assert fields_from_hf(old) == fields_from_hf(new)
    legacy = {**old, "rope_scaling": {("type" if k == "rope_type" else k): v for k, v in old["rope_scaling"].items()}}
    assert fields_from_hf(legacy) == fields_from_hf(new)
    assert fields_from_hf(new)["rope_scaling"] == RopeScaling()


models = st.builds(
    ModelConfig,
    num_layers=st.integers(1, 9),
    num_heads=st.sampled_from([2, 4]),
    num_kv_heads=st.sampled_from([1, 2]),
    head_dim=st.sampled_from([None, 16, 40]),
    norm_eps=st.sampled_from([1e-5, 1e-6]),
    rope_theta=st.sampled_from([10000.0, 5e5]),
    rope_scaling=st.none() | st.just(RopeScaling(factor=4.0, original_max_positions=512)),
    tie_embeddings=st.booleans(),
)


@settings(max_examples=25, deadline=None)
@given(model=models)
def test_transformers_reads_and_writes_the_same_shape(model: ModelConfig) -> None:
    from transformers import LlamaConfig

    expected = {name: getattr(resolve_model(model), name) for name in SHAPE}
    assert fields_from_hf(hf_config(model)) == expected
    assert fields_from_hf(LlamaConfig.from_dict(hf_config(model)).to_dict()) == expected
