"""Reads tool calls in what a policy wrote."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmtrain.data.calls import CLOSE, OPEN, call_json

FORM = f'{OPEN}{{"name": ..., "arguments": {{...}}}}{CLOSE}'
MOST_CALLS = 16  # of a turn; later ones are not made


@dataclass(frozen=True)
class ToolCall:
    """Holds a call, or what is wrong with one in words for the policy (`fault`)."""

    name: Any = None
    arguments: Any = None
    fault: str | None = None


def tagged_calls(text: str) -> list[ToolCall]:
    """Returns the calls between <tool_call> and </tool_call>, as Hermes and Qwen write them: a JSON object with `name`
    and `arguments`, which may itself be JSON in a text. What is thought before </think> calls nothing.

    Example: '<tool_call>{"name": "calculator", "arguments": {"expression": "6*7"}}</tool_call>'
    """
    said = text.rpartition("</think>")[2]
    parts = said.split(OPEN)[1 : MOST_CALLS + 1]
    return [tagged(part) for part in parts]


def tagged(part: str) -> ToolCall:
    """Returns the call in what follows <tool_call>."""
    body, closed, _ = part.partition(CLOSE)
    if not closed:
        return ToolCall(fault=f"the call is not closed; write {FORM}")
    try:
        call = call_json(body)
    except ValueError:
        return ToolCall(fault=f"the call is no JSON; write {FORM}")
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return ToolCall(fault=f"the call names no tool; write {FORM}")
    return ToolCall(call["name"], call.get("arguments", {}))


def plain_calls(text: str, first_arguments: Mapping[str, str | None]) -> list[ToolCall]:
    """Returns the calls that small models write: a line that begins with the name of a tool and a colon. What follows,
    up to the next such line, is the tool's first argument, a text. `first_arguments` has its name for each tool.

    Example: plain_calls("calculator: 6*7", {"calculator": "expression"})
    """
    said = text.rpartition("</think>")[2]
    pattern = re.compile(rf"^({'|'.join(map(re.escape, first_arguments))}):", re.MULTILINE)
    found = list(pattern.finditer(said))
    ends = [*(each.start() for each in found), len(said)][1:]
    texts = [said[each.end() : end].strip() for each, end in zip(found, ends, strict=True)]
    calls = [plain(each[1], given, first_arguments[each[1]]) for each, given in zip(found, texts, strict=True)]
    return calls[:MOST_CALLS]


def plain(name: str, given: str, argument: str | None) -> ToolCall:
    """Returns the call of a tool with its first argument; one that has none takes nothing."""
    return ToolCall(name, {} if argument is None else {argument: given})
