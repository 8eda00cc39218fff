from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from llmtrain.arch.parameters import padded_vocab_size
from llmtrain.arch.resolve import resolve_model
from llmtrain.checkpoint.source import weight_source
from llmtrain.config.recipes import config_class
from llmtrain.config.schema import ModelConfig
from llmtrain.model.decoder import parameter_shapes
from llmtrain.model.hf_write import save_hf
from llmtrain.model.vocab import resize_embedding
from llmtrain.rules.check import violations
from llmtrain.trainer.weights import grown_vocabulary, used_rows


@given(st.integers(1, 300_000), st.integers(1, 1024))
def test_padding_is_the_smallest_multiple(tokens: int, multiple: int) -> None:
    rows = padded_vocab_size(tokens, multiple)
    assert rows % multiple == 0 and tokens <= rows < tokens + multiple


def test_padding_of_known_vocabularies() -> None:
    assert [padded_vocab_size(n, m) for n, m in ((50_257, 64), (32_000, 128), (1, 8), (128_256, 1))] == [
        50_304,
        32_000,
        8,
        128_256,
    ]
    with pytest.raises(ValueError, match="tokens=0, multiple=8: both must be at least 1"):
        padded_vocab_size(0, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_old_rows_stay_and_new_ones_are_the_mean(dtype: torch.dtype) -> None:
    weight = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    grown = resize_embedding(weight, 10)
    assert grown.dtype == dtype and grown.shape == (10, 5) and torch.equal(grown[:7], weight)
    assert torch.equal(grown[7:], weight.float().mean(0).to(dtype).expand(3, 5))
    padded = resize_embedding(weight, 9, used=4)
    assert torch.equal(padded[:4], weight[:4])
    assert torch.equal(padded[4:], weight[:4].float().mean(0).to(dtype).expand(5, 5))  # rows 4 to 6 were padding
    assert torch.equal(resize_embedding(weight, 3, used=4), weight[:3])
    assert torch.equal(resize_embedding(weight, 3), weight[:3]) and torch.equal(resize_embedding(weight, 7), weight)
    assert resize_embedding(weight, 7).data_ptr() != weight.data_ptr()


def test_a_new_token_takes_no_more_than_its_share() -> None:
    """Log-probs of the old tokens move by one and the same amount, at most log(1 + new / old)."""
    generator = torch.Generator().manual_seed(0)
    head, hidden = torch.randn(50, 16, generator=generator), torch.randn(4, 16, generator=generator)
    old, new = ((hidden @ w.T).log_softmax(-1) for w in (head, resize_embedding(head, 60)))
    moved = old - new[:, :50]
    torch.testing.assert_close(moved, moved[:, :1].expand_as(moved))
    assert (moved > 0).all() and (moved <= torch.log(torch.tensor(60 / 50)) + 1e-6).all()


def test_transformers_resizes_to_the_same_mean() -> None:
    """Theirs is drawn around the mean with a covariance of 1e-9: equal but for that."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    old = model.get_input_embeddings().weight.detach().clone()
    model.resize_token_embeddings(48)
    torch.testing.assert_close(model.get_input_embeddings().weight, resize_embedding(old, 48), atol=1e-3, rtol=0)


def test_wrong_sizes_are_named() -> None:
    with pytest.raises(ValueError, match=r"rows=0, used=3: rows must be at least 1 and used in 1 .. 3"):
        resize_embedding(torch.zeros(3, 2), 0)
    with pytest.raises(ValueError, match=r"rows=5, used=4: "):
        resize_embedding(torch.zeros(3, 2), 5, used=4)


def test_weights_are_taken_into_a_larger_vocabulary(tmp_path: Path) -> None:
    small = resolve_model(ModelConfig(num_layers=1, hidden_size=16, ffn_size=16, vocab_size=50, tie_embeddings=False))
    weights = {name: torch.randn(shape) for name, shape in parameter_shapes(small).items()}
    save_hf(str(tmp_path / "hf"), small, weights.items(), torch.float32, None, None)
    grown = resolve_model(ModelConfig(init_from=str(tmp_path / "hf"), vocab_multiple=16))
    assert grown.vocab_size == 64 and resolve_model(grown) == grown
    assert resolve_model(ModelConfig(init_from=str(tmp_path / "hf"), vocab_size=60)).vocab_size == 60
    with pytest.raises(ValueError, match=r"model.vocab_size=49: the weights in .* have 50"):
        resolve_model(ModelConfig(init_from=str(tmp_path / "hf"), vocab_size=49))
    source = grown_vocabulary(weight_source(str(tmp_path / "hf"), small), grown.vocab_size)
    assert all(tuple(source(name).shape) == shape for name, shape in parameter_shapes(grown).items())
    assert torch.equal(source("head.weight")[:50], weights["head.weight"])


def test_rows_without_a_token_are_padding(tmp_path: Path) -> None:
    """The new rows of initial weights are the mean of those that their tokenizer uses."""
    assert used_rows(str(tmp_path), 48) == 48  # no tokenizer there
    Tokenizer(WordLevel({"a": 0, "b": 39})).save(str(tmp_path / "tokenizer.json"))
    assert used_rows(str(tmp_path), 48) == 40 and used_rows(str(tmp_path), 30) == 30
    weight = torch.randn(48, 4)
    grown = grown_vocabulary(lambda name: weight, 64, 40)
    assert torch.equal(grown("embed.weight")[40:], weight[:40].mean(0).expand(24, 4))
    assert grown("norm.weight") is weight


def test_only_training_of_all_weights_grows_a_vocabulary(tmp_path: Path) -> None:
    small = resolve_model(ModelConfig(num_layers=1, hidden_size=16, ffn_size=16, vocab_size=50))
    weights = ((name, torch.randn(shape)) for name, shape in parameter_shapes(small).items())
    save_hf(str(tmp_path / "hf"), small, weights, torch.float32, None, None)
    config = config_class()(model=ModelConfig(init_from=str(tmp_path / "hf"), vocab_multiple=16))
    for command, refused in (("sft", False), ("grpo", True), ("export", True)):
        lines = [
            line for line in violations(config, 1, command) if line.startswith("model.vocab_size=64: must be the 50")
        ]
        assert len(lines) == refused, command
