from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from llmtrain.config.schema import TokenizerConfig
from llmtrain.data.tokenizer import Tokenizer, load_tokenizer
from llmtrain.data.tokenizer_train import train_tokenizer

TEXT = "def f(x):\n\treturn 1234 + x  # naïve ☃\n"


def copy(tokenizer: Tokenizer, tmp_path: Path, **config: object) -> Path:
    """A copy of the directory with other entries in tokenizer_config.json (None = removed)."""
    directory = Path(shutil.copytree(tokenizer.directory, tmp_path / "copy"))
    path = directory / "tokenizer_config.json"
    merged = json.loads(path.read_text()) | config
    path.write_text(json.dumps({k: v for k, v in merged.items() if v is not None}))
    return directory


def test_round_trip_digits_and_specials(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode([*ids, tokenizer.eos_id, tokenizer.pad_id]) == TEXT
    assert [tokenizer.decode([i]) for i in tokenizer.encode("1234")] == list("1234")
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.vocab_size) == (0, 1, 270)
    assert tokenizer.encode_batch(["1", TEXT]) == [tokenizer.encode("1"), ids]


def test_special_text_in_a_document_is_plain_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("<eos>") == [tokenizer.eos_id]
    assert tokenizer.eos_id not in tokenizer.encode("<eos>", parse_special=False)


def test_transformers_sees_the_same(tokenizer: Tokenizer) -> None:
    theirs = tokenizer.hugging_face
    assert theirs(TEXT).input_ids == tokenizer.encode(TEXT)
    assert (theirs.eos_token_id, theirs.pad_token_id) == (tokenizer.eos_id, tokenizer.pad_id)


def test_fingerprint_survives_transformers_and_tells_tokenizers_apart(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.hugging_face.save_pretrained(tmp_path / "saved")
    saved = load_tokenizer(str(tmp_path / "saved"))
    assert (saved.eos_id, saved.pad_id) == (1, 0)
    assert saved.fingerprint == tokenizer.fingerprint
    train_tokenizer(["some other text " * 9] * 9, str(tmp_path / "other"), TokenizerConfig(vocab_size=262))
    assert load_tokenizer(str(tmp_path / "other")).fingerprint != tokenizer.fingerprint


def test_render_uses_the_template_and_needs_one(tokenizer: Tokenizer, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    with pytest.raises(ValueError, match="no chat template"):
        tokenizer.encode_chat(messages)
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    )
    chat = load_tokenizer(str(copy(tokenizer, tmp_path, chat_template=template)))
    assert chat.encode_chat(messages, "The answer is ") == chat.encode("<user>Hi<a>The answer is ")


def test_padding_falls_back_to_eos_and_eos_is_needed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    directory = copy(tokenizer, tmp_path, pad_token=None, eos_token={"content": "<eos>"})
    loaded = load_tokenizer(str(directory))
    assert (loaded.eos_id, loaded.pad_id) == (1, 1)
    shutil.rmtree(directory)
    with pytest.raises(ValueError, match="no eos_token"):
        load_tokenizer(str(copy(tokenizer, tmp_path, eos_token="<end>")))


def test_missing_and_broken_files_are_one_line_errors(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing/tokenizer.json: no such file"):
        load_tokenizer(str(tmp_path / "nothing"))
    directory = copy(tokenizer, tmp_path)
    (directory / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config.json: not valid JSON"):
        load_tokenizer(str(directory))
    (directory / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match=r"tokenizer.json: not a tokenizer file") as error:
        load_tokenizer(str(directory))
    assert "\n" not in str(error.value)


def test_special_tokens_count_and_are_never_text(tmp_path: Path) -> None:
    config = TokenizerConfig(vocab_size=263, special_tokens=["<|a|>", "<|b|>"])
    train_tokenizer(["some text " * 9] * 9, str(tmp_path / "t"), config)
    made = load_tokenizer(str(tmp_path / "t"))
    assert made.special_ids(["<|a|>", "<|b|>"]) == [2, 3] and (made.pad_id, made.eos_id, made.vocab_size) == (0, 1, 263)
    assert made.encode("<|b|>") == [3] and 3 not in made.encode("<|b|>", parse_special=False)
    assert made.hugging_face.convert_tokens_to_ids("<|a|>") == 2 and "<|a|>" in made.hugging_face.all_special_tokens
    with pytest.raises(ValueError, match=r"the tokenizer has no <\|c\|>, which data.fim_share"):
        made.special_ids(["<|a|>", "<|c|>"])


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer.vocab_size=500: the text yields \d+ tokens"):
        train_tokenizer(["abc"], str(tmp_path / "t"), TokenizerConfig(vocab_size=500))
    assert not (tmp_path / "t").exists()
