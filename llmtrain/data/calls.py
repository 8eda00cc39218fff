"""Reads the tool calls that a model writes, in the form of Hermes and Qwen: `<tool_call>{"name": ..., "arguments":
{...}}</tool_call>`."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from llmtrain.data.stream import unsure

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class Call(NamedTuple):
    """Holds a call. Example: Call("add", {"a": 1, "b": 2})"""

    name: str
    arguments: dict[str, Any]


class CallStream:
    """Tells calls from text that comes in pieces. A block that is no call stays text; white space around a call is
    dropped."""

    def __init__(self) -> None:
        self.held = ""  # what is not told yet: a block, what may become one, or white space
        self.behind_call = False

    def push(self, piece: str) -> tuple[str, list[Call]]:
        """Returns the text and the calls that a piece completes."""
        self.held += piece
        text, calls = "", []
        while (start := self.held.find(OPEN)) >= 0 and (stop := self.held.find(CLOSE, start)) >= 0:
            block, before = self.held[start + len(OPEN) : stop], self.held[:start]
            self.held = self.held[stop + len(CLOSE) :]
            call = read_call(block)
            text += self._text(before.rstrip() if call else f"{before}{OPEN}{block}{CLOSE}")
            calls += [call] if call else []
            self.behind_call = call is not None
        return text + self._told(), calls

    def rest(self) -> str:
        """Returns what was held back in vain."""
        text, self.held = self.held, ""
        return self._text(text)

    def _told(self) -> str:
        """Returns the held text that no call can follow closely enough to change it."""
        start = self.held.find(OPEN)
        sure = self.held[:start] if start >= 0 else self.held[: len(self.held) - unsure(self.held, (OPEN,))]
        sure = sure.rstrip()
        self.held = self.held[len(sure) :]
        return self._text(sure)

    def _text(self, text: str) -> str:
        text = text.lstrip() if self.behind_call else text
        self.behind_call = self.behind_call and not text
        return text


def read_calls(text: str) -> tuple[str, list[Call]]:
    """Returns the text outside of the calls, and the calls.

    Example: read_calls('So: <tool_call>{"name": "f", "arguments": {}}</tool_call>') is ("So:", [Call("f", {})])
    """
    stream = CallStream()
    said, calls = stream.push(text)
    return said + stream.rest(), calls


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
