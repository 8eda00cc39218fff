"""Checks docs/models.md: its counts are those of the presets, and the family that it adds is right."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Starcoder2Config, Starcoder2ForCausalLM

from llmtrain.arch.families import BUILT_IN, FAMILIES
from llmtrain.arch.resolve import active_parameter_count, parameter_count
from llmtrain.config.schema import ModelConfig
from tests.conftest import ROOT
from tests.model.families import EXAMPLES, check_generation, check_gradients, check_logits, check_round_trip

PAGE = (ROOT / "docs" / "models.md").read_text()
SHAPE = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 64}
configs = st.builds(
    Starcoder2Config,
    **{name: st.just(value) for name, value in SHAPE.items()},
    sliding_window=st.sampled_from([None, 6]),
    norm_epsilon=st.sampled_from([1e-5, 1e-2]),
    tie_word_embeddings=st.booleans(),
)


@pytest.fixture(scope="module")
def starcoder2() -> Iterator[None]:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(code.splitlines()) <= 60
    exec(code, {})
    yield
    del FAMILIES["starcoder2"]


@settings(EXAMPLES, max_examples=5)
@given(config=configs)
def test_logits(starcoder2: None, config: Starcoder2Config) -> None:
    check_logits(Starcoder2ForCausalLM, config)


def test_the_rest(starcoder2: None) -> None:
    config = Starcoder2Config(**SHAPE, sliding_window=6)
    check_gradients(Starcoder2ForCausalLM, config)
    check_round_trip(Starcoder2ForCausalLM, config)
    check_generation(Starcoder2ForCausalLM, config)
    count = parameter_count(ModelConfig(preset="starcoder2-7b"))  # the released model has 7,173,923,840
    assert count == 7_173_923_840


def test_counts_of_the_page() -> None:
    written = {name: numbers for name, *numbers in re.findall(r"`([\w.-]+)` ([\d.]+)(?: \(([\d.]+) active\))?", PAGE)}
    assert written.keys() == {name for family in BUILT_IN for name in family.presets}
    for name, numbers in written.items():
        model = ModelConfig(preset=name)
        counts = (parameter_count(model), active_parameter_count(model))
        for number, count in zip(numbers, counts, strict=True):
            assert float(number or numbers[0]) == float(f"{count / 1e9:.3g}"), name
