from __future__ import annotations

import math

import pytest
import torch

from llmtrain.config.schema import ModelConfig
from llmtrain.eval.perplexity import perplexity
from llmtrain.model.decoder import Decoder, initialize
from llmtrain.types import IGNORE, Batch

CONFIG = ModelConfig(num_layers=1, hidden_size=16, ffn_size=32, num_heads=2, num_kv_heads=1, vocab_size=32)


def _model() -> Decoder:
    model = Decoder(CONFIG)
    initialize(model, CONFIG, seed=0)
    return model


def _batch(seed: int, rows: int, trained: int) -> Batch:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, CONFIG.vocab_size, (rows, 8), generator=g)
    labels = torch.randint(0, CONFIG.vocab_size, (rows, 8), generator=g)
    labels[:, trained:] = IGNORE
    mask = labels != IGNORE
    mask[0, 0] = False  # labelled, but not counted
    return Batch(ids, labels, mask, torch.arange(8).expand(rows, 8))


def test_every_token_counts_once() -> None:
    model, batches = _model(), [_batch(0, 3, 8), _batch(1, 1, 2)]  # 23 and 1 tokens: no mean of means
    result = perplexity(model, batches, bytes_per_token=2.5)
    nats = 0.0
    for b in batches:
        logp = model(b.input_ids, b.positions).log_softmax(-1).gather(-1, b.labels.clamp(min=0)[..., None])[..., 0]
        nats -= logp[b.loss_mask].sum().item()
    assert result["loss"] == pytest.approx(nats / 24, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    assert result["bits_per_byte"] == pytest.approx(result["loss"] / math.log(2) / 2.5)
    assert perplexity(model, batches, bytes_per_token=2.5) == result


def test_uniform_model_has_the_vocabulary_as_perplexity() -> None:
    model = _model()
    torch.nn.init.zeros_(model.head.weight)
    result = perplexity(model, [_batch(0, 2, 8)], bytes_per_token=5.0)
    assert result["perplexity"] == pytest.approx(32, rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(1.0, rel=1e-5)  # 5 bits a token of 5 bytes


def test_autocast_is_used() -> None:
    exact = perplexity(_model(), [_batch(0, 2, 8)], 1.0)["loss"]
    rounded = perplexity(_model(), [_batch(0, 2, 8)], 1.0, torch.bfloat16)["loss"]
    assert rounded != exact and rounded == pytest.approx(exact, abs=0.01)


def test_nothing_to_predict_is_refused() -> None:
    with pytest.raises(ValueError, match="held_out"):
        perplexity(_model(), [_batch(0, 2, 0)], 1.0)
