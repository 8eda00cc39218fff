from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmtrain.data.prompts import PromptSet
from llmtrain.data.tokenizer import Tokenizer


def write(tmp_path: Path, *records: dict) -> str:
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, records)))
    return str(tmp_path / "p.jsonl")


def test_prompts_and_prefill(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": "1 + 1 =", "answer": "2"}, {"prompt": "a<eos>", "prefill": " b"})
    prompts = PromptSet(path, tokenizer, 20)
    assert prompts.prompt_ids(0) == tokenizer.encode("1 + 1 =")
    assert prompts.prompt_ids(1) == tokenizer.encode("a<eos> b", parse_special=False)
    assert prompts.examples[0]["answer"] == "2"


def test_all_examples_come_once_an_epoch(tokenizer: Tokenizer, tmp_path: Path) -> None:
    prompts = PromptSet(write(tmp_path, *({"prompt": str(i)} for i in range(30))), tokenizer, 20)
    first, second = ([prompts.at(e * 30 + i, 4) for i in range(30)] for e in (0, 1))
    assert sorted(first) == sorted(second) == list(range(30))
    assert first != second


def test_a_long_or_missing_prompt_is_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"p.jsonl:2: the prompt has 6 tokens, more than the 5 there is room for; make"
    ):
        PromptSet(write(tmp_path, {"prompt": "1"}, {"prompt": "123456"}), tokenizer, 5)
    with pytest.raises(ValueError, match=r"p.jsonl:1: the row is a text without a prompt; give the fields"):
        PromptSet(write(tmp_path, {"text": "1"}), tokenizer, 5)
