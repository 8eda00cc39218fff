"""A tiny tokenizer for the tests of this folder."""

from __future__ import annotations

import random

import pytest

from llmtrain.data.arithmetic import arithmetic_documents
from llmtrain.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = str(tmp_path_factory.mktemp("tokenizer") / "small")
    train_tokenizer(arithmetic_documents(3, 1.0, random.Random(0)), directory, 270)
    return load_tokenizer(directory)
