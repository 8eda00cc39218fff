"""A scalar head is new where the weights to start from are a language model's, and kept where they have one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from llmtrain.arch.resolve import resolve_model
from llmtrain.arch.start import new_parameters
from llmtrain.config.schema import Config, LoraConfig, ModelConfig
from llmtrain.model.decoder import init_tensor, parameter_shapes
from llmtrain.model.hf_write import save_hf
from llmtrain.trainer.weights import scalar_model, start_source

SMALL = {"num_layers": 1, "hidden_size": 8, "ffn_size": 8, "num_heads": 2, "num_kv_heads": 2, "vocab_size": 16}


def started(model: ModelConfig, seed: int) -> dict[str, Tensor]:
    """All weights that a run of one process would begin with."""
    resolved = resolve_model(model)
    source = start_source(SimpleNamespace(config=Config(model=model, seed=seed), model=resolved, mesh=None))
    return {name: source(name) for name in parameter_shapes(resolved)}


def written(directory: Path, model: ModelConfig, seed: int) -> dict[str, Tensor]:
    values = {name: init_tensor(name, shape, model, seed) for name, shape in parameter_shapes(model).items()}
    save_hf(str(directory), model, values.items(), torch.float32, None, 1)
    return values


def test_on_a_tied_language_model(tmp_path: Path) -> None:
    body = written(tmp_path, resolve_model(ModelConfig(**SMALL)), seed=1)
    model = ModelConfig(init_from=str(tmp_path), head="scalar")
    first = started(model, seed=5)
    assert torch.equal(first.pop("head.weight"), init_tensor("head.weight", (1, 8), resolve_model(model), 5))
    assert first.keys() == body.keys() and all(torch.equal(first[name], body[name]) for name in body)


def test_on_an_untied_language_model_its_head_is_left(tmp_path: Path) -> None:
    body = written(tmp_path, resolve_model(ModelConfig(**SMALL, tie_embeddings=False)), seed=1)
    first = started(ModelConfig(init_from=str(tmp_path), head="scalar"), seed=5)
    assert first["head.weight"].shape == (1, 8) and torch.equal(first["embed.weight"], body["embed.weight"])


def test_a_body_of_ones_own_or_of_another_directory(tmp_path: Path) -> None:
    """The second starts from its own weights; a vocabulary that is too small for the tokens of the run is refused."""
    model = resolve_model(ModelConfig(**SMALL, lora=LoraConfig()))
    job = SimpleNamespace(config=Config(), model=model, mesh=None, base="kept")
    job.tokenizer = SimpleNamespace(vocab_size=16, fingerprint="x")
    own = scalar_model(job)
    assert (own.head, own.tie_embeddings, own.lora, own.num_layers) == ("scalar", False, None, 1)
    scalar = resolve_model(ModelConfig(**{**SMALL, "num_layers": 2, "head": "scalar"}))
    values = written(tmp_path, scalar, seed=3)
    found = scalar_model(job, str(tmp_path))
    assert found.num_layers == 2 and found.head == "scalar"
    source = start_source(job, found, str(tmp_path))
    assert all(torch.equal(source(name), value) for name, value in values.items()) and job.base == "kept"
    job.tokenizer.vocab_size = 17
    with pytest.raises(ValueError, match="was trained with another tokenizer than this run has"):
        scalar_model(job, str(tmp_path))


def test_what_is_new() -> None:
    scalar, language = (resolve_model(ModelConfig(**SMALL, head=head)) for head in ("scalar", "lm"))
    assert new_parameters(scalar, language) == {"head.weight"}
    assert new_parameters(scalar, scalar) == new_parameters(language, language) == set()
    adapted = language.model_copy(update={"lora": LoraConfig()})
    assert new_parameters(adapted, language) == {f"layers.0.attention.{p}.lora.{x}" for p in "qv" for x in "ab"}
