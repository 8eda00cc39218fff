"""Three algorithms, three rules for words, three for digits: nothing of a text is ever lost."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from llmtrain.config.schema import DataConfig, SourceConfig, TokenizerConfig
from llmtrain.data.arithmetic import arithmetic_documents
from llmtrain.data.collect import documents
from llmtrain.data.prepare import tokenizer_texts
from llmtrain.data.shards import split_documents
from llmtrain.data.tokenizer import Tokenizer, load_tokenizer
from llmtrain.data.tokenizer_train import pre_tokenizer, train_tokenizer

CHAT = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}, {"role": "user", "content": "Why?"}]
KINDS = {
    "bpe": {"algorithm": "bpe"},
    "bpe, gpt4": {"algorithm": "bpe", "split": "gpt4", "digits": "triples", "chat": "chatml"},
    "bpe, gpt4o": {"algorithm": "bpe", "split": "gpt4o", "digits": "none"},
    "wordpiece": {"algorithm": "wordpiece", "digits": "triples"},
    "wordpiece, gpt4o": {"algorithm": "wordpiece", "split": "gpt4o", "digits": "single", "special_tokens": ["<|a|>"]},
    "unigram": {"algorithm": "unigram", "digits": "none"},
    "unigram, gpt4": {"algorithm": "unigram", "split": "gpt4", "digits": "single", "chat": "chatml"},
}
AWKWARD = [
    " ",
    "  ",
    "\t",
    "\n",
    "\r\n",
    "\x00",
    "\x85",
    "\u3000",
    "1",
    "23",
    "#",
    "##",
    "##a",
    "Ġ",
    "▁",
    "<eos>",
    "<pad>",
]
AWKWARD += [
    "<|im_end|>",
    "<|a|>",
    "[UNK]",
    "<unk>",
    "e\u0301",
    "\u200d",
    "\U0010ffff",
    "\ufffd",
    "'ll",
    "naïve",
    "日本語",
    "👩‍👩‍👧",
]
TEXT = st.lists(st.one_of(st.text(), st.sampled_from(AWKWARD)), max_size=12).map("".join)


def corpus() -> list[str]:
    prose = documents(SourceConfig(name="t", type="topics", max_bytes=60_000), 0)
    return [*prose, *arithmetic_documents(2, 0.5, random.Random(0))]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    made, texts = {}, corpus()
    for number, (kind, keys) in enumerate(KINDS.items()):
        directory = str(tmp_path_factory.mktemp("tokenizers") / str(number))
        train_tokenizer(texts, directory, TokenizerConfig(vocab_size=600, **keys))
        made[kind] = load_tokenizer(directory)
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_any_text_comes_back_byte_for_byte(kind: str, trained: dict[str, Tokenizer]) -> None:
    tokenizer = trained[kind]

    @settings(max_examples=150, deadline=None)
    @given(TEXT)
    def check(text: str) -> None:
        ids = tokenizer.encode(text, parse_special=False)
        assert tokenizer.decode(ids) == text
        assert not {tokenizer.eos_id, tokenizer.pad_id} & set(ids)

    check()
    assert tokenizer.vocab_size == 600


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_every_character_of_unicode_comes_back(kind: str, trained: dict[str, Tokenizer]) -> None:
    characters = [chr(i) for i in range(sys.maxunicode + 1) if not 0xD800 <= i < 0xE000]
    for start in range(0, len(characters), 65_536):
        text = "".join(characters[start : start + 65_536])
        assert trained[kind].decode(trained[kind].encode(text, parse_special=False)) == text


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_sees_the_same_tokens(kind: str, trained: dict[str, Tokenizer]) -> None:
    tokenizer, text = trained[kind], "The    value's naïve 1234\r\n\n\tdef  f(x): return ☃"
    theirs = tokenizer.hugging_face
    ids = tokenizer.encode(text)
    assert theirs(text).input_ids == ids and theirs.decode(ids) == text
    assert (theirs.eos_token_id, theirs.pad_token_id, len(theirs)) == (1, 0, 600)


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_one_very_long_word(kind: str, trained: dict[str, Tokenizer]) -> None:
    text = "x" * 50_000 + "é" * 5_000
    assert trained[kind].decode(trained[kind].encode(text)) == text


def words(text: str, **keys: str) -> list[str]:
    """The cut text, its bytes written as text again."""
    steps = pre_tokenizer(TokenizerConfig(**keys))
    return [decoders.ByteLevel().decode([word]) for word, _ in steps.pre_tokenize_str(text)]


def test_rules_cut_as_the_published_ones_do() -> None:
    text = "I'LL say  x=1234\r\n\r\n  it's camelCase/\n"
    assert words("I'LL it's  x\n\n y", digits="none") == ["I", "'", "LL", " it", "'s", " ", " x", "\n\n", " y"]
    gpt4 = ["I", "'LL", " say", " ", " x", "=", "123", "4", "\r\n\r\n", " ", " it", "'s", " camelCase", "/\n"]
    assert words(text, split="gpt4", digits="triples") == gpt4
    gpt4o = ["I'LL", " say", " ", " x", "=", "1234", "\r\n\r\n", " ", " it's", " camel", "Case", "/\n"]
    assert words(text, split="gpt4o", digits="none") == gpt4o


@pytest.mark.parametrize("split", ["gpt2", "gpt4", "gpt4o"])
@pytest.mark.parametrize("algorithm", ["bpe", "wordpiece", "unigram"])
def test_digits(split: str, algorithm: str) -> None:
    rules = {"split": split, "algorithm": algorithm}
    assert words("a12345b", **rules, digits="single") == ["a", "1", "2", "3", "4", "5", "b"]
    assert words("a12345b", **rules, digits="triples") == ["a", "123", "45", "b"]
    assert words("a12345b", **rules, digits="none") == ["a", "12345", "b"]


def test_the_default_is_what_it_always_was(tmp_path: Path) -> None:
    """GPT-2's rule with every digit by itself, written out: other settings must not move a bit of it."""
    expected = tokenizers.Tokenizer(models.BPE())
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    expected.pre_tokenizer, expected.decoder = pre_tokenizers.Sequence(steps), decoders.ByteLevel()
    keys = {"special_tokens": ["<pad>", "<eos>"], "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    expected.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=700, show_progress=False, **keys))
    train_tokenizer(corpus(), str(tmp_path / "t"), TokenizerConfig(vocab_size=700))
    assert json.loads((tmp_path / "t/tokenizer.json").read_text()) == json.loads(expected.to_str())
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "pad_token": "<pad>"}
    assert json.loads((tmp_path / "t/tokenizer_config.json").read_text()) == config | {
        "clean_up_tokenization_spaces": False
    }


@pytest.mark.parametrize("kind", ["wordpiece", "unigram"])
def test_training_again_gives_the_same_file(kind: str, trained: dict[str, Tokenizer], tmp_path: Path) -> None:
    train_tokenizer(corpus(), str(tmp_path / "t"), TokenizerConfig(vocab_size=600, **KINDS[kind]))
    again, first = (Path(path, "tokenizer.json").read_bytes() for path in (tmp_path / "t", trained[kind].directory))
    assert again == first


@pytest.mark.parametrize("kind", ["bpe, gpt4", "unigram, gpt4"])
def test_chat_is_rendered_and_each_turn_ends_as_an_answer_does(kind: str, trained: dict[str, Tokenizer]) -> None:
    tokenizer = trained[kind]
    prompt = tokenizer.encode_chat(CHAT[:1])
    assert prompt == tokenizer.encode("<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n")
    start, end = tokenizer.special_ids(["<|im_start|>", "<|im_end|>"])
    assert (end, start) == (tokenizer.eos_id, 2)
    theirs = tokenizer.hugging_face.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    answered = [*prompt, *tokenizer.encode("4"), tokenizer.eos_id]
    assert theirs[: len(answered)] == answered and theirs.count(start) == 4 and theirs.count(end) == 3
    assert tokenizer.encode_chat(CHAT) == theirs and tokenizer.turn_end_ids == (end,)


@pytest.mark.parametrize("algorithm", ["wordpiece", "unigram"])
def test_too_little_text_is_refused(algorithm: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer.vocab_size=900: the text yields \d+ tokens"):
        train_tokenizer(["abc abd"], str(tmp_path / "t"), TokenizerConfig(vocab_size=900, algorithm=algorithm))
    assert not (tmp_path / "t").exists()


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["bpe", "wordpiece"])
def test_32768_tokens_from_the_text_of_every_machine(algorithm: str, tmp_path: Path) -> None:
    sources = [SourceConfig(name="code", type="stdlib"), SourceConfig(name="prose", type="topics")]
    config = TokenizerConfig(algorithm=algorithm, vocab_size=32_768, train_bytes=32_000_000, split="gpt4")
    texts = tokenizer_texts(DataConfig(sources=sources), config, str(tmp_path), 0)
    train_tokenizer(texts, str(tmp_path / "t"), config)
    tokenizer = load_tokenizer(str(tmp_path / "t"))
    held_out = [text for source in sources for split, text in split_documents(source, 0) if split == "held_out"]
    ids = tokenizer.encode_batch(held_out, parse_special=False)
    assert [tokenizer.decode(i) for i in ids] == held_out and tokenizer.vocab_size == 32_768
    assert len("".join(held_out).encode()) / sum(map(len, ids)) > 4.2  # bytes a token; GPT-2's: see docs/tokenizers.md
