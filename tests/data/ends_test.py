"""The tokens at which a generation ends, from every place that may name one."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llmtrain.data.chat import CHATML
from llmtrain.data.ends import end_ids, generation_settings
from llmtrain.data.tokenizer import Tokenizer, load_tokenizer

SPECIAL = ["<pad>", "<eos>", "<bos>", "<start>", "<end>", "<|im_start|>", "<|im_end|>"]  # ids 0 to 6
CHAT = "{{ '<bos>' }}{% for m in messages %}{{ '<start>' + m.role + m.content + "
LOOP = " }}{% endfor %}{% if add_generation_prompt %}{{ '<start>assistant' }}{% endif %}"


def made(directory: Path, template: str | dict | None = None, special: list[str] = SPECIAL) -> Tokenizer:
    """A tokenizer of single characters and special tokens, whose end of text is <eos>."""
    backend = Backend(models.WordLevel({chr(i): i - 32 + len(special) for i in range(32, 127)}, unk_token=" "))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    vocabulary = {token: i for i, token in enumerate(special)} | {chr(i): i - 32 + len(special) for i in range(32, 127)}
    backend.model = models.WordLevel(vocabulary, unk_token=" ")
    more = [s for s in special if s not in ("<eos>", "<pad>")]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", additional_special_tokens=more
    )
    fast.chat_template = template
    fast.save_pretrained(directory)
    return load_tokenizer(str(directory))


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, 1),  # the end of text
        (CHATML, 6),
        (CHAT + "'<end>\n'" + LOOP, 4),
        (CHAT + "'  \n<end>'" + LOOP, 4),  # spaces may lie between
        (CHAT + "' over.<end>'" + LOOP, 1),  # text may not
        (CHAT + "''" + LOOP, 1),
        (CHAT + "'<eos>'" + LOOP, 1),
        ({"default": CHAT + "'<end>'" + LOOP, "tools": CHATML}, 4),
    ],
)
def test_the_turn_end_of_a_template(template: str | dict | None, expected: int, tmp_path: Path) -> None:
    assert made(tmp_path, template).turn_end_ids == (expected,)


def test_a_template_that_cannot_be_rendered_is_told_and_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert end_ids(made(tmp_path, "{{ raise_exception('only tools') }}"), ()) == (1,)
    assert f"{tmp_path}: the chat template tells no end of a turn: only tools" in caplog.text


def place(directory: Path, name: str = "generation_config.json", **settings: object) -> str:
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(json.dumps(settings))
    return str(directory)


def test_end_tokens_of_all_places_each_once(tmp_path: Path) -> None:
    tokenizer = made(tmp_path / "tokenizer", CHAT + "'<end>'" + LOOP)
    first, second = place(tmp_path / "a", eos_token_id=[3, 1], top_k=5), place(tmp_path / "b", eos_token_id=6)
    assert end_ids(tokenizer, ()) == (1, 4)
    assert end_ids(tokenizer, (None, first, str(tmp_path / "nothing"), second)) == (3, 1, 6, 4)
    assert generation_settings(tokenizer, (None, second, first)) == {"eos_token_id": [6, 3, 1, 4]}
    assert generation_settings(tokenizer, (first, second)) == {"eos_token_id": [3, 1, 6, 4], "top_k": 5}
    old = place(tmp_path / "c", "config.json", eos_token_id=[3], bos_token_id=2, hidden_size=8)
    assert generation_settings(tokenizer, (old,)) == {"eos_token_id": [3, 1, 4], "bos_token_id": 2}


def test_one_end_token_is_a_number_and_what_was_there_keeps_its_form(tmp_path: Path) -> None:
    tokenizer = made(tmp_path / "tokenizer")
    assert generation_settings(tokenizer, ()) == {"eos_token_id": 1}
    for form in (1, [1]):
        assert generation_settings(tokenizer, (place(tmp_path / "a", eos_token_id=form),)) == {"eos_token_id": form}


def test_tokens_that_the_tokenizer_lacks_or_spells_otherwise_are_left_out(tmp_path: Path) -> None:
    tokenizer = made(tmp_path / "tokenizer")
    beyond = {"eos_token_id": [4, 102, -1, 10**6], "pad_token_id": 999, "bos_token_id": 2, "top_p": 0.5}
    kept = {"eos_token_id": [4, 1], "bos_token_id": 2, "top_p": 0.5}
    assert generation_settings(tokenizer, (place(tmp_path / "a", **beyond),)) == kept
    other = tmp_path / "other"
    made(other, special=["<pad>", "<eos>", "<end>", "<bos>", "<start>"])
    place(other, eos_token_id=[1, 2], bos_token_id=3, top_k=3)  # <eos>, <end> and <bos> there
    assert generation_settings(tokenizer, (str(other),)) == {"eos_token_id": [1], "top_k": 3}
    assert generation_settings(load_tokenizer(str(other)), (str(other),))["eos_token_id"] == [1, 2]
