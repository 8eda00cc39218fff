"""SentencePiece models, trained here by SentencePiece: our reading of them gives its ids."""

from __future__ import annotations

import io
import unicodedata
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from llmtrain.config.schema import SourceConfig
from llmtrain.data.collect import documents
from llmtrain.data.sentencepiece import read_sentencepiece

spm = pytest.importorskip("sentencepiece", reason="the extra `dev` installs it")

VERBATIM = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}  # as Llama's and Gemma's models
LLAMA = {**VERBATIM, "byte_fallback": True, "split_digits": True, "allow_whitespace_only_pieces": True}
GEMMA = {**LLAMA, "add_dummy_prefix": False, "user_defined_symbols": ["<mask>", "\n\n", "\t"]}
KINDS = {
    "bpe, as Llama": {"model_type": "bpe", **LLAMA},
    "bpe, as Gemma": {"model_type": "bpe", **GEMMA},
    "unigram, byte fallback": {"model_type": "unigram", **LLAMA},
    "unigram, as T5": {"model_type": "unigram"},  # NFKC, spaces collapsed, unknown characters
    "unigram, NFKC, byte fallback": {"model_type": "unigram", "byte_fallback": True},
}
PIECES = [
    "<s>",
    "</s>",
    "<unk>",
    "<0x41>",
    "<0x0A>",
    "<mask>",
    "\n\n",
    "\r\n",
    " ",
    "  ",
    "\t",
    "statement",
    "Ａ",
    "ﬁ",
    "日本",
]
TEXT = st.lists(st.one_of(st.text(max_size=8), st.sampled_from(PIECES)), max_size=12).map("".join)


def lines() -> list[str]:
    chapters = documents(SourceConfig(name="t", type="topics", max_bytes=60_000), 0)
    return [line for text in chapters for line in text.splitlines() if line.strip()] + ["naïve ☃ 日本語 ﬁ Ａ"] * 20


def train(path: Path, **keys: object) -> spm.SentencePieceProcessor:
    file = io.BytesIO()
    common = {"vocab_size": 500, "minloglevel": 2, "num_threads": 1, "sentence_iterator": iter(lines())}
    spm.SentencePieceTrainer.train(model_writer=file, **(common | keys))
    path.write_bytes(file.getvalue())
    return spm.SentencePieceProcessor(model_proto=file.getvalue())


def same(ours: list[int], theirs: list[int], kind: str) -> bool:
    """Equal; with unigram also equal but for the order of pieces whose scores tie (`**`, `*` or `*`, `**`)."""
    return ours == theirs or (kind.startswith("unigram") and sorted(ours) == sorted(theirs))


def loses_marks(text: str) -> bool:
    """Says whether a mark follows a character that NFKC changes: of such a cluster the library's normalizer may read
    the character alone (docs/tokenizers.md)."""
    return any(
        unicodedata.category(after)[0] == "M" and unicodedata.normalize("NFKC", before) != before
        for before, after in pairwise(text)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_text_are_sentencepieces(kind: str, tmp_path: Path) -> None:
    theirs = train(tmp_path / "x.model", **KINDS[kind])
    ours, entries = read_sentencepiece(tmp_path / "x.model")
    ours = Tokenizer.from_str(ours.to_str())  # as it is read from a file
    ours.encode_special_tokens = True
    assert entries["eos_token"] == "</s>" and ours.get_vocab_size() == theirs.vocab_size()
    equal = []

    @settings(max_examples=200, deadline=None)
    @given(TEXT)
    @example("\xb8\u0df2")
    def check(text: str) -> None:
        assume("normalization_rule_name" in KINDS[kind] or not loses_marks(text))
        ids = ours.encode(text, add_special_tokens=False).ids
        assert same(ids, theirs.encode(text), kind), theirs.encode(text, out_type=str)
        equal.append(ids == theirs.encode(text))
        if "normalization_rule_name" in KINDS[kind] and "▁" not in text:
            assert ours.decode(ids, skip_special_tokens=False) == text

    check()
    for line in lines():
        assert same(ours.encode(line, add_special_tokens=False).ids, theirs.encode(line), kind)
        equal.append(ours.encode(line, add_special_tokens=False).ids == theirs.encode(line))
    assert sum(equal) >= 0.98 * len(equal)


def test_special_tokens_are_not_text(tmp_path: Path) -> None:
    train(tmp_path / "x.model", **KINDS["bpe, as Llama"], pad_id=3)
    ours, entries = read_sentencepiece(tmp_path / "x.model")
    assert (entries["bos_token"], entries["pad_token"]) == ("<s>", "<pad>")
    assert ours.encode("</s>", add_special_tokens=False).ids == [2]
    ours.encode_special_tokens = True
    assert 2 not in ours.encode("</s>", add_special_tokens=False).ids


def test_models_that_cannot_be_rebuilt_are_named(tmp_path: Path) -> None:
    train(tmp_path / "char.model", model_type="char", vocab_size=80)
    with pytest.raises(ValueError, match=r"char.model: a SentencePiece model of words or characters, only .* are read"):
        read_sentencepiece(tmp_path / "char.model")
    train(tmp_path / "both.model", model_type="bpe", user_defined_symbols=["<mask>"])
    with pytest.raises(ValueError, match="user-defined symbols and a dummy prefix"):
        read_sentencepiece(tmp_path / "both.model")


def test_a_file_that_is_none_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.model"
    train(path, model_type="bpe")
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"x.model: not a SentencePiece model, or cut short$"):
        read_sentencepiece(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"it has no pieces$"):
        read_sentencepiece(path)
