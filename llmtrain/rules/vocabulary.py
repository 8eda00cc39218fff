"""Checks that every token id has a row in the embedding. Each rule says value, rule and remedy."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

from llmtrain.config.recipes import JUDGES
from llmtrain.rules.case import Case, Rules, command, either, plans, pretrains


def makes_tokenizer(case: Case) -> bool:
    """Says whether there is no tokenizer yet."""
    return not os.path.exists(_directory(case))


def _directory(case: Case) -> str:
    return case.config.tokenizer.path or os.path.join(case.config.directory, "tokenizer")


def _new_tokenizer(case: Case) -> Iterator[str]:
    t = case.config.tokenizer
    if case.model and makes_tokenizer(case) and not t.base and case.model.vocab_size < t.vocab_size:
        yield (
            f"model.vocab_size={case.model.vocab_size}: must be at least "
            f"tokenizer.vocab_size={t.vocab_size}; raise it or lower the tokenizer's"
        )


def _ids(case: Case) -> Iterator[str]:
    places = (_directory(case), case.config.tokenizer.base or "")
    place = next((each for each in places if os.path.isfile(os.path.join(each, "tokenizer.json"))), None)
    if case.model is None or place is None:
        return
    last = largest_id(os.path.join(place, "tokenizer.json"))
    if last is not None and last >= case.model.vocab_size:
        yield (
            f"model.vocab_size={case.model.vocab_size}: must be above {last}, the largest token id of {place}; raise "
            "it, or use the tokenizer that the model was trained with"
        )


def largest_id(path: str) -> int | None:
    """Returns the largest id in a tokenizer.json, which may be beyond the number of tokens; None where the file is
    broken: who loads it says so."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        vocabulary = content["model"]["vocab"]  # a list in unigram models, else token -> id
        ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        return max([*ids, *(token["id"] for token in content.get("added_tokens") or [])])
    except (ValueError, KeyError, TypeError):
        return None


VOCABULARY_RULES: Rules = (
    (pretrains, _new_tokenizer),
    (either(plans, command("eval", "export", *JUDGES)), _ids),
)
