"""Reads the tool calls that a model writes, in the form of Hermes and Qwen: `<tool_call>{"name": ..., "arguments":
{...}}</tool_call>`. What it thinks, between <think> and </think>, calls nothing."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from llmtrain.data.chat import CLOSE as THOUGHT_END
from llmtrain.data.chat import OPEN as THOUGHT
from llmtrain.data.stream import unsure

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class Call(NamedTuple):
    """Holds a call. Example: Call("add", {"a": 1, "b": 2})"""

    name: str
    arguments: dict[str, Any]


class CallStream:
    """Tells calls from text that comes in pieces. A block that is no call stays text, and so does a thought with all
    that stands in it; white space around a call is dropped. With `thinking` the text begins within a thought."""

    def __init__(self, thinking: bool = False) -> None:
        self.held = ""  # what is not told yet: a block, what may become one, or white space
        self.behind_call, self.thinking = False, thinking

    def push(self, piece: str) -> tuple[str, list[Call]]:
        """Returns the text and the calls that a piece completes."""
        self.held += piece
        text, calls = "", []
        while (stop := self._stop()) >= 0:
            part, self.held = self.held[:stop], self.held[stop:]
            before, _, block = part.partition(OPEN)
            call = None if self.thinking else read_call(block.removesuffix(CLOSE))
            text += self._text(before.rstrip() if call else part)
            calls += [call] if call else []
            self.behind_call, self.thinking = call is not None, False
        return text + self._told(), calls

    def rest(self) -> str:
        """Returns what was held back in vain."""
        text, self.held = self.held, ""
        return self._text(text)

    def _stop(self) -> int:
        """Returns where the thought or the block ends that stands first in the held text, -1 where it does not yet."""
        call, thought = self.held.find(OPEN), self.held.find(THOUGHT)
        self.thinking = self.thinking or 0 <= thought < (call if call >= 0 else len(self.held))
        if call < 0 and not self.thinking:
            return -1
        mark = THOUGHT_END if self.thinking else CLOSE
        found = self.held.find(mark, 0 if self.thinking else call)
        return found if found < 0 else found + len(mark)

    def _told(self) -> str:
        """Returns the held text that no call can follow closely enough to change it."""
        marks, start = (THOUGHT_END,) if self.thinking else (OPEN, THOUGHT), self.held.find(OPEN)
        whole = start >= 0 and not self.thinking
        sure = self.held[:start] if whole else self.held[: len(self.held) - unsure(self.held, marks)]
        sure = sure.rstrip()
        self.held = self.held[len(sure) :]
        return self._text(sure)

    def _text(self, text: str) -> str:
        text = text.lstrip() if self.behind_call else text
        self.behind_call = self.behind_call and not text
        return text


def read_call(block: str) -> Call | None:
    """Returns the call that a block holds, None where it holds something else."""
    try:
        found = call_json(block)
    except ValueError:
        return None
    name, arguments = (found.get("name"), found.get("arguments", {})) if isinstance(found, dict) else (None, None)
    return Call(name, arguments) if isinstance(name, str) and name and isinstance(arguments, dict) else None


def call_json(block: str) -> Any:
    """Returns the JSON in a block; `arguments` may themselves be JSON in a text, and are read too. Raises ValueError
    where it is none, or has half a character (such as "\\ud83d", of a surrogate pair), which nobody could encode."""
    try:
        found = json.loads(block)
        if isinstance(found, dict) and isinstance(found.get("arguments"), str):
            found["arguments"] = json.loads(found["arguments"])
        json.dumps(found, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("is nested too deep") from None
    return found
