"""Presets have the published sizes; shapes survive config.json in both of its forms."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.config.families import presets
from llmtrain.config.load import dump, load
from llmtrain.config.schema import Config, ModelConfig, RopeScaling
from llmtrain.config.shapes import SHAPE, fields_from_hf, hf_config, parameter_count, resolve_model


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("llama3-8b", 8_030_261_248),
        ("llama3-70b", 70_553_706_496),
        ("llama3-405b", 405_853_388_800),
        ("llama3.1-8b", 8_030_261_248),
        ("smollm2-135m", 134_515_008),
    ],
)
def test_presets_have_the_published_parameter_counts(preset: str, count: int) -> None:
    assert parameter_count(ModelConfig(preset=preset)) == count


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
