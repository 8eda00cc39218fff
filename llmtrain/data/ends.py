"""Finds the tokens at which a generation ends: those of the tokenizer, of its chat template and of the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmtrain.arch.generation import TOKENS, as_list, read_generation
from llmtrain.data.tokenizer import Tokenizer, read_backend


def end_ids(tokenizer: Tokenizer, places: Sequence[str | None]) -> tuple[int, ...]:
    """Returns the tokens that end a generation, each once: the end tokens of the generation settings in `places`
    (directories of models and runs; None: nothing), the tokenizer's end of text, and its chat template's end of turn.

    Raises ValueError as `read_generation` does.
    """
    found = [as_list(own_settings(tokenizer, place).get("eos_token_id")) for place in places if place]
    own = (tokenizer.eos_id, *tokenizer.turn_end_ids)
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
