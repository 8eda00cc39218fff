"""A tokenizer made from another one: ids stay, special tokens are added."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest

from llmtrain.config.schema import DataConfig, SourceConfig, TokenizerConfig
from llmtrain.data.collect import documents
from llmtrain.data.prepare import prepare
from llmtrain.data.tokenizer import Tokenizer, load_tokenizer
from llmtrain.data.tokenizer_base import tokenizer_from_base

CHAT = [{"role": "user", "content": "Hi"}]


def made(tmp_path: Path, base: object, **keys: object) -> Tokenizer:
    config = TokenizerConfig(base=str(base), **keys)
    tokenizer_from_base(str(tmp_path / "made"), config, DataConfig())
    return load_tokenizer(str(tmp_path / "made"))


def test_a_copy_is_the_same_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    copy = made(tmp_path, tokenizer.directory)
    assert copy.fingerprint == tokenizer.fingerprint and (copy.eos_id, copy.pad_id) == (1, 0)


def test_chat_and_special_tokens_follow_after_the_last(tokenizer: Tokenizer, tmp_path: Path) -> None:
    chat = made(tmp_path, tokenizer.directory, chat="chatml", special_tokens=["<tool>", "<pad>"])
    assert chat.special_ids(["<|im_end|>", "<|im_start|>", "<tool>", "<pad>"]) == [270, 271, 272, 0]
    assert (chat.eos_id, chat.pad_id, chat.vocab_size) == (270, 0, 273)
    assert chat.encode("12 + 3") == tokenizer.encode("12 + 3")
    rendered = chat.hugging_face.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    assert rendered == chat.encode_chat(CHAT) and rendered[0] == 271 and rendered.count(270) == 1
    assert chat.hugging_face.eos_token_id == 270 and "<tool>" in chat.hugging_face.all_special_tokens


def test_a_template_of_its_own_file_is_kept(tokenizer: Tokenizer, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tokenizer.directory, tmp_path / "base"))
    (base / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    assert made(tmp_path, base).chat.render(CHAT, generate=True) == "Hi!"


def test_a_sentencepiece_directory_becomes_one_that_transformers_reads(tmp_path: Path) -> None:
    spm = pytest.importorskip("sentencepiece", reason="the extra `dev` installs it")
    file, chapters = io.BytesIO(), documents(SourceConfig(name="t", type="topics", max_bytes=40_000), 0)
    keys = {"model_type": "bpe", "byte_fallback": True, "vocab_size": 400, "minloglevel": 2}
    keys |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    lines = [line for text in chapters for line in text.splitlines()]
    spm.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=file, **keys)
    (tmp_path / "base").mkdir()
    (tmp_path / "base/tokenizer.model").write_bytes(file.getvalue())
    theirs = spm.SentencePieceProcessor(model_proto=file.getvalue())
    text = " The  statement\tis\r\n naïve: ☃"
    config = TokenizerConfig(base=str(tmp_path / "base"), chat="chatml")
    prepare(DataConfig(), config, str(tmp_path / "data"), str(tmp_path / "made"), 0)
    ours = load_tokenizer(str(tmp_path / "made"))
    assert ours.encode(text) == theirs.encode(text) == ours.hugging_face(text).input_ids
    assert ours.decode(ours.encode(text)) == ours.hugging_face.decode(ours.encode(text)) == text
    assert (ours.eos_id, ours.vocab_size) == (400, 402)
    assert (
        ours.encode_chat(CHAT) == ours.hugging_face.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    )


def test_what_is_no_tokenizer_is_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer.base=.*: no tokenizer.json and no tokenizer.model, .* give one"):
        made(tmp_path, tmp_path)
    (tmp_path / "x.model").write_text(json.dumps({"not": "one"}))
    with pytest.raises(ValueError, match=r"x.model: not a SentencePiece model"):
        made(tmp_path, tmp_path / "x.model")
    assert not (tmp_path / "made").exists()
