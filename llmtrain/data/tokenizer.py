"""Hugging Face tokenizer directories: trained here, or any that transformers saved."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAD, EOS = "<pad>", "<eos>"  # ids 0 and 1


def train_tokenizer(texts: Iterable[str], directory: str, vocab_size: int, specials: Sequence[str] = ()) -> None:
    """Byte-level BPE (arXiv 1508.07909) in which every digit is a token, written as a Hugging Face directory.

    `specials` are special tokens beside padding and end of text; they count in `vocab_size`. The directory
    appears whole or not at all. Raises ValueError when `texts` do not yield `vocab_size` tokens.
    """
    from tokenizers import decoders, models, pre_tokenizers, trainers

    bpe = tokenizers.Tokenizer(models.BPE())
    digits, bytes_ = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[PAD, EOS, *specials], initial_alphabet=alphabet, show_progress=False
        ),
    )
    if bpe.get_vocab_size() != vocab_size:
        raise ValueError(
            f"tokenizer.vocab_size={vocab_size}: the text yields {bpe.get_vocab_size()} tokens (256 bytes, "
            f"{2 + len(specials)} specials and merges); give more text or that size"
        )
    save(bpe, directory)


def save(bpe: tokenizers.Tokenizer, directory: str) -> None:
    """tokenizer.json and the tokenizer_config.json that AutoTokenizer wants; by a rename, so never half-written."""
    unfinished = directory.rstrip("/") + ".tmp"
    shutil.rmtree(unfinished, ignore_errors=True)
    os.makedirs(unfinished)
    bpe.save(os.path.join(unfinished, "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "pad_token": PAD}
    config["clean_up_tokenization_spaces"] = False
    Path(unfinished, "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    os.rename(unfinished, directory)


class Tokenizer:
    """Text to token ids and back. Nothing is added to a text: no BOS, no EOS."""

    def __init__(self, bpe: tokenizers.Tokenizer, directory: str, eos_id: int, pad_id: int) -> None:
        self.bpe, self.directory = bpe, directory
        self.eos_id, self.pad_id = eos_id, pad_id
        self.vocab_size = bpe.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, parse_special: bool = True) -> list[int]:
        """Token ids. With `parse_special=False` the text `<eos>` is five characters and not the end of a document."""
        return self.encode_batch([text], parse_special)[0]

    def encode_batch(self, texts: Sequence[str], parse_special: bool = True) -> list[list[int]]:
        """`encode` of many texts, on all cores."""
        self.bpe.encode_special_tokens = not parse_special
        return [e.ids for e in self.bpe.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text, without special tokens."""
        return self.bpe.decode(list(ids), skip_special_tokens=True)

    def special_ids(self, names: Sequence[str]) -> list[int]:
        """The ids of special tokens. Raises ValueError naming those that are missing."""
        ids = [self.bpe.token_to_id(name) for name in names]
        missing = [name for name, i in zip(names, ids, strict=True) if i is None]
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise ValueError(
                f"{self.directory}: the tokenizer has no {', '.join(missing[:3])}{more}, which data.fim_share and "
                "data.span_share need; add them as special tokens, or set the share to 0"
            )
        return ids

    @cached_property
    def fingerprint(self) -> str:
        """A hash of vocabulary, merges and rules, but not of what is added to a text: that is never used here, and
        transformers rewrites it when it saves."""
        rules = json.loads(self.bpe.to_str())
        kept = {name: rule for name, rule in rules.items() if name not in ("post_processor", "padding", "truncation")}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]

    @cached_property
    def hugging_face(self) -> PreTrainedTokenizerBase:
        """The same directory as transformers sees it."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.directory, local_files_only=True)

    def render(self, messages: list[dict[str, str]], prefill: str = "") -> str:
        """The chat as text, up to where the assistant speaks, followed by `prefill`.

        Raises ValueError when the directory has no chat template.
        """
        if not self.hugging_face.chat_template:
            raise ValueError(
                f"{self.directory}: the tokenizer has no chat template, so `messages` cannot be rendered; give the "
                "field `prompt` instead, or add `chat_template` to tokenizer_config.json"
            )
        chat = self.hugging_face.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return chat + prefill


def load_tokenizer(directory: str) -> Tokenizer:
    """The tokenizer of a Hugging Face directory (tokenizer.json, tokenizer_config.json).

    Raises ValueError when a file is missing or broken, or when there is no end-of-text token. Without a padding token
    the end-of-text token pads: padding is masked.
    """
    path = Path(directory, "tokenizer.json")
    if not path.is_file():
        raise ValueError(f"{path}: no such file; tokenizer.path must be a directory saved by transformers")
    try:
        bpe = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path}: not a tokenizer file ({str(error).splitlines()[0]})") from None
    config = read_config(Path(directory, "tokenizer_config.json"))
    eos_id = special_id(bpe, config, "eos_token")
    if eos_id is None:
        raise ValueError(f"{directory}/tokenizer_config.json: no eos_token that the vocabulary knows; add one")
    pad_id = special_id(bpe, config, "pad_token")
    bpe.no_padding()
    bpe.no_truncation()
    return Tokenizer(bpe, directory, eos_id, eos_id if pad_id is None else pad_id)


def read_config(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; it must name the eos_token") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None


def special_id(bpe: tokenizers.Tokenizer, config: dict[str, Any], name: str) -> int | None:
    """The id of `eos_token` or `pad_token`, which is written as a string or as an object with `content`."""
    token = config.get(name)
    token = token.get("content") if isinstance(token, dict) else token
    return None if token is None else bpe.token_to_id(token)
