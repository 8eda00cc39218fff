"""Loads and saves Hugging Face tokenizer directories: trained here, or any that transformers saved."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

from llmtrain.arch.own_code import loading_fault
from llmtrain.data.chat import Chat
from llmtrain.data.special import SpecialText
from llmtrain.observe.owned import replacing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def save(tokenizer: tokenizers.Tokenizer, directory: str, config: Mapping[str, object]) -> None:
    """Writes tokenizer.json, and `config` as the tokenizer_config.json that AutoTokenizer needs.

    The directory appears whole, see `replacing`.
    """
    with replacing(directory, "llmtrain tokenizer") as unfinished:
        tokenizer.save(str(unfinished / "tokenizer.json"))
        (unfinished / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


class Tokenizer:
    """Converts text to token ids and back. It adds nothing to a text by itself; `prefix_ids` says what belongs before
    one.

    `template` and `template_kwargs` choose and fill the chat template (`tokenizer.chat_template`,
    `tokenizer.chat_template_kwargs`). With `bare`, transformers is known to add nothing to a text either.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        directory: str,
        eos_id: int,
        pad_id: int,
        template: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        bare: bool = False,
    ) -> None:
        self.backend, self.directory = backend, directory
        self.eos_id, self.pad_id = eos_id, pad_id
        self.template, self.template_kwargs, self.bare = template, template_kwargs or {}, bare
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values())  # ids may have gaps

    def encode(self, text: str, parse_special: bool = True) -> list[int]:
        """Returns token ids. With `parse_special=False` the text `<eos>` is five characters and not the end of a
        document."""
        return self.encode_batch([text], parse_special)[0]

    def encode_batch(self, texts: Sequence[str], parse_special: bool = True) -> list[list[int]]:
        """Returns `encode` of many texts, computed on all cores."""
        backend = self.backend if parse_special else self.special_text.backend
        return [e.ids for e in backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    @cached_property
    def special_text(self) -> SpecialText:
        """Returns what keeps special tokens apart from text that spells them."""
        return SpecialText(self.backend)

    @cached_property
    def prefix_ids(self) -> list[int]:
        """Returns what the model's own tokenizer puts before a text, such as BOS: what `tokenizer(text)` of
        transformers does. What it may put behind a text, such as an end of text, is left to training."""
        if self.bare:
            return []
        plain, whole = (self.hugging_face("a", add_special_tokens=added).input_ids for added in (False, True))
        at = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
        return whole[:at]

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
        """Returns the tokenizer that transformers loads from the directory. Raises ValueError when it cannot."""
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.directory, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # of many kinds, by what is broken
            reason = loading_fault(error)
            raise ValueError(f"{self.directory}: transformers cannot load this tokenizer ({reason}); mend it") from None

    @cached_property
    def chat(self) -> Chat:
        """Returns the chat template. Raises ValueError when there is none, or it is broken."""
        return Chat(self, self.template, self.template_kwargs)

    def encode_chat(
        self,
        messages: Sequence[dict[str, Any]],
        prefill: str = "",
        tools: Any = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Returns the tokens of a conversation, up to the start of the assistant's next turn, which begins with
        `prefill`. `tools` and `kwargs` are for the template. Raises ValueError when there is no chat template, or it
        refuses the messages."""
        return self.chat.special.encode_batch([self.chat.render(messages, True, tools, kwargs) + prefill])[0].ids

    @cached_property
    def has_chat(self) -> bool:
        """Returns whether there is a chat template, without loading what renders it."""
        places = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
        config = Path(self.directory, "tokenizer_config.json").read_text()
        written = '"chat_template"' in config or any(Path(self.directory, name).exists() for name in places)
        return self.template is not None or written

    @cached_property
    def turn_end_ids(self) -> tuple[int, ...]:
        """Returns the ids of the token that ends a turn of the assistant in the chat template; the end-of-text token
        where the template has no other, cannot be used, or is not there."""
        try:
            return self.chat.turn_end_ids if self.has_chat else (self.eos_id,)
        except ValueError as error:  # it concerns those only who give messages
            logger.warning("%s; generations end at the end of text", error)
            return (self.eos_id,)


def load_tokenizer(
    directory: str, template: str | None = None, template_kwargs: Mapping[str, Any] | None = None
) -> Tokenizer:
    """Returns the tokenizer of a Hugging Face directory (tokenizer.json, tokenizer_config.json), with a choice of its
    chat templates and the variables for it.

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
    padding = eos_id if pad_id is None else pad_id
    return Tokenizer(backend, directory, eos_id, padding, template, template_kwargs, adds_nothing(backend, config))


def adds_nothing(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> bool:
    """Returns whether transformers surely adds no token to a text: it has no rule, and no class with rules of its
    own. Asking transformers itself costs its import."""
    plain_class = config.get("tokenizer_class") in ("PreTrainedTokenizerFast", "TokenizersBackend")
    return plain_class and backend.post_processor is None and not {"add_bos_token", "add_eos_token"} & config.keys()


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
