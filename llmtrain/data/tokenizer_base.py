"""Makes a tokenizer from a SentencePiece model or a Hugging Face directory, with special tokens added."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from llmtrain.config.schema import DataConfig, TokenizerConfig
from llmtrain.config.specials import added_tokens, end_of_text
from llmtrain.data.chat import TEMPLATES
from llmtrain.data.sentencepiece import FILES, read_sentencepiece
from llmtrain.data.tokenizer import read_backend, read_config, save


def tokenizer_from_base(directory: str, config: TokenizerConfig, data: DataConfig) -> None:
    """Writes a Hugging Face directory from `config.base`, whole or not at all.

    Tokens that already exist keep their ids; others follow after the last. Raises ValueError when `config.base` is
    neither a SentencePiece model nor a tokenizer directory, or cannot be read.
    """
    backend, entries = read_base(Path(config.base))
    added = added_tokens(config, data)
    if config.chat != "none":
        entries |= {"eos_token": end_of_text(config), "chat_template": TEMPLATES[config.chat]}
        added.insert(0, end_of_text(config))
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in added])
    if added:
        entries["extra_special_tokens"] = [*entries.get("extra_special_tokens", []), *added]
    save(backend, directory, entries)


def read_base(base: Path) -> tuple[Tokenizer, dict[str, Any]]:
    """Returns (tokenizer, entries of tokenizer_config.json) of a base."""
    if base.is_file():
        return read_sentencepiece(base)
    if (base / "tokenizer.json").is_file():
        return read_backend(base), read_entries(base)
    for name in FILES:
        if (base / name).is_file():
            return read_sentencepiece(base / name)
    raise ValueError(f"tokenizer.base={base}: no tokenizer.json and no {', '.join(FILES)} there; give one of these")


def read_entries(directory: Path) -> dict[str, Any]:
    """Returns the entries of tokenizer_config.json, with the chat template from its own file if it has one."""
    entries = read_config(directory / "tokenizer_config.json")
    entries.pop("added_tokens_decoder", None)  # tokenizer.json holds the same list
    template = directory / "chat_template.jinja"
    return entries | ({"chat_template": template.read_text()} if template.is_file() else {})
