"""Renders rows of dialogues as plain text: a turn a paragraph, `role: content`."""

from __future__ import annotations

import json
from typing import Any

from llmtrain.data.chat import Message
from llmtrain.data.rows import Example, shape_of


def rendered(record: dict[str, Any]) -> str:
    """Returns the text of a row of any shape that `llmtrain.data.rows` knows; of a preference, the chosen answer.
    Raises ValueError when it has none.

    Example: {"prompt": "2+2?", "completion": "4"} -> "user: 2+2?" + two newlines + "assistant: 4"
    """
    example = shape_of(record, {})(record)
    if example.prompt is None:  # a text without turns
        return example.answer
    turns = example.prompt if isinstance(example.prompt, list) else [{"role": "user", "content": example.prompt}]
    return "\n\n".join(f"{turn['role']}: {said(turn)}" for turn in [*turns, *answer_of(example)])


def answer_of(example: Example) -> list[Message]:
    """Returns the turns that answer the prompt."""
    if example.turns or example.answer is None:
        return example.turns
    answer = example.answer if isinstance(example.answer, str) else json.dumps(example.answer, default=str)
    begun = example.record.get("prefill")
    return [{"role": "assistant", "content": begun + answer if isinstance(begun, str) else answer}]


def said(turn: Message) -> str:
    """Returns the content of a turn; where it calls tools, the calls as JSON behind it."""
    calls = turn.get("tool_calls")
    return turn["content"] + (json.dumps(calls, ensure_ascii=False, default=str) if calls else "")
