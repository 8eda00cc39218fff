"""Provides a tiny tokenizer for the tests of this folder."""

from __future__ import annotations

import random

import pytest

from llmtrain.config.schema import TokenizerConfig
from llmtrain.data.arithmetic import arithmetic_documents
from llmtrain.data.tokenizer import Tokenizer, load_tokenizer
from llmtrain.data.tokenizer_train import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = str(tmp_path_factory.mktemp("tokenizer") / "small")
    train_tokenizer(arithmetic_documents(3, 1.0, random.Random(0)), directory, TokenizerConfig(vocab_size=270))
    return load_tokenizer(directory)
