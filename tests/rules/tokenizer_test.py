"""What a tokenizer that is yet to be made may be asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtrain.config.schema import Config, DataConfig, ModelConfig, TokenizerConfig
from llmtrain.rules.check import violations

SMALLEST = 256 + 2


def faults(command: str, model: int = 1024, data: DataConfig | None = None, **keys: object) -> list[str]:
    tokenizer = TokenizerConfig(**({"path": "not/there"} | keys))
    config = Config(name="x", model=ModelConfig(vocab_size=model), data=data or DataConfig(), tokenizer=tokenizer)
    return [fault for fault in violations(config, 1, command) if "tokenizer" in fault]


@pytest.mark.parametrize("command", ["tokenizer", "data", "pretrain"])
def test_all_bytes_and_special_tokens_must_fit(command: str) -> None:
    assert faults(command, vocab_size=SMALLEST) == []
    [fault] = faults(command, vocab_size=SMALLEST - 1)
    assert fault == ("tokenizer.vocab_size=257: must be at least 258, 256 bytes and 2 special tokens; raise it")
    asked = {"chat": "chatml", "special_tokens": ["<a>", "<b>"], "data": DataConfig(fim_share=0.5, span_share=0.5)}
    assert faults(command, vocab_size=SMALLEST + 1 + 2 + 3 + 100, **asked) == []
    assert "must be at least 364" in faults(command, vocab_size=SMALLEST + 105, **asked)[0]
    assert faults(command, vocab_size=10, path=str(Path(__file__).parent)) == []  # it is there already


@pytest.mark.parametrize("name", ["<pad>", "<eos>", "", "<a>"])
def test_special_tokens_are_named_once(name: str) -> None:
    [fault] = faults("tokenizer", special_tokens=["<a>", name])
    assert fault == f"tokenizer.special_tokens: {name!r} must not be empty or named twice; remove it"
    assert faults("tokenizer", special_tokens=["<a>", "<|im_end|>"]) == []
    assert len(faults("tokenizer", special_tokens=["<|im_end|>"], chat="chatml")) == 1


def test_a_base_is_not_trained() -> None:
    assert faults("pretrain", base=__file__, model=32, chat="chatml", special_tokens=["<a>"]) == []
    [fault] = faults("tokenizer", base="no/where.model")
    assert fault.startswith("tokenizer.base=no/where.model: does not exist")
    found = faults("tokenizer", base=__file__, vocab_size=2048, algorithm="unigram")
    assert [f.split(":")[0] for f in found] == ["tokenizer.algorithm=unigram", "tokenizer.vocab_size=2048"]
    assert all("must not be set with tokenizer.base" in f for f in found)
