"""Loads and saves Hugging Face tokenizer directories: trained here, or any that transformers saved."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

from llmtrain.observe.owned import replacing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def save(tokenizer: tokenizers.Tokenizer, directory: str, config: Mapping[str, object]) -> None:
    """Writes tokenizer.json, and `config` as the tokenizer_config.json that AutoTokenizer needs.

    The directory appears whole, see `replacing`.
    """
    with replacing(directory, "llmtrain tokenizer") as unfinished:
        tokenizer.save(str(unfinished / "tokenizer.json"))
        (unfinished / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


class Tokenizer:
    """Converts text to token ids and back. It adds nothing to a text: no BOS, no EOS."""

    def __init__(self, backend: tokenizers.Tokenizer, directory: str, eos_id: int, pad_id: int) -> None:
        self.backend, self.directory = backend, directory
        self.eos_id, self.pad_id = eos_id, pad_id
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values())  # ids may have gaps

    def encode(self, text: str, parse_special: bool = True) -> list[int]:
        """Returns token ids. With `parse_special=False` the text `<eos>` is five characters and not the end of a
        document."""
        return self.encode_batch([text], parse_special)[0]

    def encode_batch(self, texts: Sequence[str], parse_special: bool = True) -> list[list[int]]:
        """Returns `encode` of many texts, computed on all cores."""
        self.backend.encode_special_tokens = not parse_special
        return [e.ids for e in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Returns the text, without special tokens unless told otherwise."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special)

    def special_ids(self, names: Sequence[str]) -> list[int]:
        """Returns the ids of special tokens. Raises ValueError naming those that are missing."""
        ids = [self.backend.token_to_id(name) for name in names]
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
        """Returns a hash of vocabulary, merges and rules.

        The post-processor, padding and truncation are left out: they are never used here, and transformers rewrites
        them when it saves.
        """
        rules = json.loads(self.backend.to_str())
        kept = {name: rule for name, rule in rules.items() if name not in ("post_processor", "padding", "truncation")}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]

    @cached_property
    def hugging_face(self) -> PreTrainedTokenizerBase:
        """Returns the tokenizer that transformers loads from the directory."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.directory, local_files_only=True)

    def render(self, messages: list[dict[str, str]], prefill: str = "") -> str:
        """Returns the chat as text, up to the start of the assistant's turn, followed by `prefill`.

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
    """Returns the tokenizer of a Hugging Face directory (tokenizer.json, tokenizer_config.json).

    Raises ValueError when a file is missing or broken, or when there is no end-of-text token. Without a padding token
    the end-of-text token pads: padding is masked.
    """
    backend = read_backend(Path(directory))
    config = read_config(Path(directory, "tokenizer_config.json"))
    eos_id = special_id(backend, config, "eos_token")
    if eos_id is None:
        raise ValueError(f"{directory}/tokenizer_config.json: no eos_token that the vocabulary knows; add one")
    pad_id = special_id(backend, config, "pad_token")
    backend.no_padding()
    backend.no_truncation()
    return Tokenizer(backend, directory, eos_id, eos_id if pad_id is None else pad_id)


def read_backend(directory: Path) -> tokenizers.Tokenizer:
    """Returns the content of tokenizer.json. Raises ValueError when it is missing or broken."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file; tokenizer.path must be a directory saved by transformers (tokenizer.base makes one "
            "of a SentencePiece .model)"
        )
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path}: not a tokenizer file ({str(error).splitlines()[0]})") from None


def read_config(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; it must name the eos_token") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None


def special_id(backend: tokenizers.Tokenizer, config: dict[str, Any], name: str) -> int | None:
    """Returns the id of `eos_token` or `pad_token`, which is written as a string or as an object with `content`."""
    token = config.get(name)
    token = token.get("content") if isinstance(token, dict) else token
    return None if token is None else backend.token_to_id(token)
