"""Reads how a model generates: generation_config.json, which runs carry along too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

GENERATION = "generation_config.json"
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def read_generation(directory: str) -> dict[str, Any]:
    """Returns the generation settings in the directory of a model or a run: those of generation_config.json, else the
    token ids in config.json, where transformers looks next. Empty where there is neither.

    Raises ValueError when a file is broken, or a token in it has no number.
    """
    path = Path(directory, GENERATION)
    if path.is_file():
        return _checked(path, _object(path))
    path = path.with_name("config.json")
    if not path.is_file():
        return {}
    config = _object(path)
    text = config.get("text_config")
    found = {**(text if isinstance(text, dict) else {}), **config}
    return _checked(path, {name: found[name] for name in TOKENS if found.get(name) is not None})


def as_list(ids: Any) -> list:
    """Returns the tokens of an entry, which is null, one number or a list."""
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); copy the file again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: must be an object of settings, is {json.dumps(found)[:50]}; copy the file again")
    return found


def _checked(path: Path, found: dict[str, Any]) -> dict[str, Any]:
    for name in TOKENS:
        if not all(type(token) is int for token in as_list(found.get(name))):
            rule = "must be a token's number, in brackets where there are several; correct it"
            raise ValueError(f"{path}: {name}={json.dumps(found[name])}: {rule}")
    return found
