"""Embeddings against the mean of hidden states, one text at a time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from llmtrain.data.search.encoder import Encoder

TEXTS = ["the cat sat", "dog", "a bird sat on the cats the dog", ""]


def test_a_batch_gives_the_mean_of_each_text_at_length_one(encoder_directory: Path) -> None:
    encoder = Encoder(str(encoder_directory), torch.device("cpu"))
    rows, cut = encoder.embed(TEXTS, 4)
    assert rows.shape == (4, 16) and cut == 0
    for row, text in zip(rows, TEXTS, strict=True):
        with torch.no_grad():
            hidden = encoder.model(**encoder.tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        mean = hidden.mean(0).numpy()
        # rounding: padding changes the order of the sums in attention
        np.testing.assert_allclose(row, mean / np.linalg.norm(mean), atol=1e-5)
    np.testing.assert_allclose(encoder.embed(TEXTS, 1)[0], rows, atol=1e-5)


def test_of_a_long_text_the_beginning_counts(encoder_directory: Path) -> None:
    encoder = Encoder(str(encoder_directory), torch.device("cpu"))
    assert encoder.max_tokens == 12
    told: list[int] = []
    rows, cut = encoder.embed(["cat " * 50, "cat " * 10, "cat " * 11], 2, told.append)
    assert cut == 2 and told == [2, 3]  # [CLS] and [SEP] count
    np.testing.assert_allclose(rows[0], rows[1], atol=1e-5)


def test_what_is_no_encoder_is_refused(encoder_directory: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no encoder can be loaded from it"):
        Encoder(str(tmp_path), torch.device("cpu"))
    shutil.copytree(encoder_directory, tmp_path / "code")
    config = json.loads((tmp_path / "code" / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModel": "own.M"}}
    (tmp_path / "code" / "config.json").write_text(json.dumps(config))
    (tmp_path / "code" / "own.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(ValueError, match="which is never run"):
        Encoder(str(tmp_path / "code"), torch.device("cpu"))
    shutil.copytree(encoder_directory, tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no encoder can be loaded from it"):
        Encoder(str(tmp_path / "pickled"), torch.device("cpu"))
