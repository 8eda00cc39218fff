from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from llmtrain.config.schema import SourceConfig, TokenizerConfig
from llmtrain.data.shards import check_tokenizer, holds_out, open_shards, split_documents, token_dtype, write_shards
from llmtrain.data.tokenizer import Tokenizer, load_tokenizer
from llmtrain.data.tokenizer_train import train_tokenizer
from tests.data.families import family


@pytest.fixture
def source(tmp_path: Path) -> SourceConfig:
    lines = [json.dumps({"text": f"document {i} <eos> " + "x" * i}) for i in range(100)]
    (tmp_path / "docs.jsonl").write_text("\n".join(lines))
    return SourceConfig(name="docs", type="jsonl", path=str(tmp_path / "docs.jsonl"), held_out=0.1)


def test_every_document_comes_back(source: SourceConfig, tokenizer: Tokenizer, tmp_path: Path) -> None:
    seen: list[tuple[str, int]] = []
    write_shards([source], tokenizer, str(tmp_path / "s"), 0, lambda name, n: seen.append((name, n)))
    expected = list(split_documents(source, 0))
    assert {text for _, text in expected} == {f"document {i} <eos> " + "x" * i for i in range(100)}
    for split in ("train", "held_out"):
        shard = open_shards(str(tmp_path / "s"), split)["docs"]
        spans = zip(shard.offsets[:-1], shard.offsets[1:], strict=True)
        ids = [shard.tokens[a:b].tolist() for a, b in spans]
        texts = [text for s, text in expected if s == split]
        assert [tokenizer.decode(i) for i in ids] == texts
        assert all(i[-1] == tokenizer.eos_id and tokenizer.eos_id not in i[:-1] for i in ids)
        assert shard.text_bytes == sum(len(t.encode()) for t in texts)
        assert isinstance(shard.tokens, np.memmap)
    assert seen[-1] == ("docs", sum(len(t.encode()) for _, t in expected))


@pytest.mark.parametrize(("share", "held"), [(0.0, 0), (0.05, 5), (0.1, 10), (0.5, 50), (0.9, 90)])
def test_the_held_out_share(source: SourceConfig, share: float, held: int) -> None:
    splits = [s for s, _ in split_documents(source.model_copy(update={"held_out": share}), 0)]
    assert abs(splits.count("held_out") - held) <= 1
    assert splits[0] == "train"
    assert (splits[1] == "held_out") == (share > 0)  # so that two documents are enough to have both


@pytest.mark.parametrize(
    ("text", "share", "train"),
    [
        ("one\ntwo\nthree\nfour\n", 0.5, "one\ntwo\n"),  # behind a line
        ("one two three four", 0.5, "one two "),  # behind a word
        ("x" * 10, 0.3, "x" * 7),
        ("one\ntwo\n", 0.0, "one\ntwo\n"),
    ],
)
def test_one_document_is_split_by_its_text(tmp_path: Path, text: str, share: float, train: str) -> None:
    (tmp_path / "x.txt").write_text(text)
    one = SourceConfig(name="one", type="text", path=str(tmp_path / "x.txt"), held_out=share)
    splits = list(split_documents(one, 0))
    assert splits == [("train", train), *([("held_out", text[len(train) :])] if share else [])]


def test_documents_begin_as_the_model_s_own_tokenizer_begins_them(source: SourceConfig, tmp_path: Path) -> None:
    tokenizer = family("gemma", tmp_path)
    write_shards([source.model_copy(update={"held_out": 0.0})], tokenizer, str(tmp_path / "s"), 0)
    shard = open_shards(str(tmp_path / "s"), "train")["docs"]
    text = next(text for _, text in split_documents(source, 0))
    theirs = tokenizer.hugging_face(text.replace("<eos>", "")).input_ids
    first = shard.tokens[: shard.offsets[1]].tolist()
    assert first[0] == theirs[0] == tokenizer.hugging_face.bos_token_id and first.count(tokenizer.eos_id) == 1
    assert not holds_out(str(tmp_path / "s"))


def test_a_cut_or_missing_file_is_named(source: SourceConfig, tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_shards([source], tokenizer, str(tmp_path), 0)
    path = tmp_path / "docs-train.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"docs-train.bin: \d+ bytes where shards.json says \d+"):
        open_shards(str(tmp_path), "train")
    path.unlink()
    with pytest.raises(ValueError, match=r"docs-train.bin: -1 bytes"):
        open_shards(str(tmp_path), "train")
    with pytest.raises(ValueError, match=r"no token shards yet"):
        open_shards(str(tmp_path / "nowhere"), "train")


def test_another_tokenizer_is_refused(source: SourceConfig, tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_shards([source], tokenizer, str(tmp_path / "s"), 0)
    check_tokenizer(str(tmp_path / "s"), tokenizer)
    train_tokenizer(["some other text " * 9] * 9, str(tmp_path / "other"), TokenizerConfig(vocab_size=262))
    with pytest.raises(ValueError, match="made with tokenizer"):
        check_tokenizer(str(tmp_path / "s"), load_tokenizer(str(tmp_path / "other")))


def test_large_vocabularies_take_four_bytes() -> None:
    assert (token_dtype(65536), token_dtype(65537)) == ("uint16", "uint32")
