"""Finds the tokens at which a generation ends: those of the tokenizer, of its chat template and of the model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from llmtrain.arch.generation import TOKENS, as_list, read_generation
from llmtrain.data.tokenizer import Tokenizer, read_backend

SAID = "xyzzy"  # by an assistant, in a conversation that is only rendered to see what follows

logger = logging.getLogger(__name__)


def end_ids(tokenizer: Tokenizer, places: Sequence[str | None]) -> tuple[int, ...]:
    """Returns the tokens that end a generation, each once: the end tokens of the generation settings in `places`
    (directories of models and runs; None: nothing), the tokenizer's end of text, and its chat template's end of turn.

    Raises ValueError as `read_generation` does.
    """
    found = [as_list(own_settings(tokenizer, place).get("eos_token_id")) for place in places if place]
    turn = turn_end(tokenizer)
    own = [tokenizer.eos_id] + [turn] * (turn is not None)
    return tuple(dict.fromkeys(id_ for ids in (*found, own) for id_ in ids))


def generation_settings(tokenizer: Tokenizer, places: Sequence[str | None]) -> dict[str, Any]:
    """Returns the generation settings that go with the tokenizer: those of the first of `places` that has some, with
    all of `end_ids` as end tokens. Raises ValueError as `read_generation` does."""
    settings = (own_settings(tokenizer, place) for place in places if place)
    found, ends = next(filter(None, settings), {}), list(end_ids(tokenizer, places))
    if as_list(found.get("eos_token_id")) == ends:
        return found
    return {**found, "eos_token_id": ends if len(ends) > 1 else ends[0]}


def own_settings(tokenizer: Tokenizer, place: str) -> dict[str, Any]:
    """Returns the generation settings in a directory, without tokens that the tokenizer lacks, or that stand for
    another text in the tokenizer of that directory."""
    settings = read_generation(place)
    beside = Path(place)
    other = tokenizer.backend
    if (beside / "tokenizer.json").is_file() and not beside.samefile(tokenizer.directory):
        other = read_backend(beside)

    def known(id_: int) -> bool:
        token = tokenizer.backend.id_to_token(id_) if id_ >= 0 else None
        return token is not None and token == other.id_to_token(id_)

    for name in TOKENS:
        if isinstance(settings.get(name), list):
            settings[name] = [id_ for id_ in settings[name] if known(id_)]
        elif settings.get(name) is not None and not known(settings[name]):
            settings[name] = None
    return {name: value for name, value in settings.items() if name not in TOKENS or value not in (None, [])}


def turn_end(tokenizer: Tokenizer) -> int | None:
    """Returns the token that the chat template puts behind what the assistant says; None where there is no template, or
    it puts none there: spaces may lie between them, text may not."""
    if not has_template(tokenizer.directory):
        return None
    chat = [{"role": role, "content": SAID} for role in ("user", "assistant")]
    try:
        text = tokenizer.hugging_face.apply_chat_template(chat, tokenize=False)
    except (TemplateError, ValueError) as error:  # it may want other roles, or tools, or have no default
        logger.warning("%s: the chat template tells no end of a turn: %s", tokenizer.directory, error)
        return None
    behind = text.rpartition(SAID)[2].lstrip()
    added = {token.content: id_ for id_, token in tokenizer.backend.get_added_tokens_decoder().items()}
    return max(((len(name), id_) for name, id_ in added.items() if behind.startswith(name)), default=(0, None))[1]


def has_template(directory: str) -> bool:
    """Tells whether the directory of a tokenizer holds a chat template, without loading the tokenizer."""
    places = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
    config = Path(directory, "tokenizer_config.json").read_text()
    return '"chat_template"' in config or any(Path(directory, name).exists() for name in places)
