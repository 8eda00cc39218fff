"""Reads rows with a chosen and a rejected answer as conversations."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from llmtrain.config.schema import DataConfig
from llmtrain.data.asked import messages_of, spoken
from llmtrain.data.chat import Message
from llmtrain.data.faults import Faults
from llmtrain.data.files import read_rows
from llmtrain.data.rows import parse_row

SPEAKERS = {"Human": "user", "Assistant": "assistant"}
TURN = re.compile(r"\n\n(Human|Assistant):")  # of hh-rlhf


@dataclass(frozen=True)
class Preference:
    """Holds a conversation and two answers to its last turn.

    Example: Preference([{"role": "user", "content": "2+2?"}], "4", "5")
    """

    messages: list[Message]
    chosen: str
    rejected: str


def read_preferences(path: str) -> list[Preference]:
    """Returns the preferences of a file of rows. Raises ValueError with all faults of the file."""
    faults, found = Faults(path), []
    for where, record in read_rows(path, faults):
        try:
            found.append(preference(record))
        except ValueError as error:
            faults.add(where, str(error))
    faults.raise_any()
    return found


def preference(record: dict[str, Any]) -> Preference:
    """Returns the preference in a row; texts of hh-rlhf, which repeat the whole conversation, are read as turns. Raises
    ValueError, without a place, when there is none."""
    if "prompt" not in record and all(isinstance(record.get(name), str) for name in ("chosen", "rejected")):
        record = {**record, **{name: dialogue(record[name]) for name in ("chosen", "rejected")}}
    example = parse_row(record, DataConfig(), answered=False)
    if example.rejected is None:
        raise ValueError("must have `chosen` and `rejected`; add them")
    chosen = spoken(example.turns) if example.turns else example.answer
    rejected = spoken(example.rejected) if isinstance(example.rejected, list) else example.rejected
    return Preference(messages_of(example), example.prefill + chosen, example.prefill + rejected)


def dialogue(text: str) -> list[Message]:
    """Returns the turns of a text of hh-rlhf. Raises ValueError, without a place, when it is none.

    Example: "\\n\\nHuman: hi\\n\\nAssistant: yo" -> [user "hi", assistant "yo"]
    """
    before, *parts = TURN.split(text)
    if before.strip() or not parts:
        raise ValueError("the row has no `prompt`, and its texts do not begin with a turn `Human:`; add the prompt")
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": SPEAKERS[speaker], "content": said.strip()} for speaker, said in turns]
