"""Tool calls in what a policy wrote, in both forms, malformed and hostile ones among them."""

from __future__ import annotations

import pytest

from llmtrain.envs.calls import FORM, ToolCall, plain_calls, tagged_calls

NO_JSON = ToolCall(fault=f"the call is no JSON; write {FORM}")
CALL = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        (CALL, [ToolCall("add", {"a": 1})]),
        (f"I add.\n{CALL} and\n{CALL}", [ToolCall("add", {"a": 1})] * 2),
        ('<tool_call>\n{"name": "add", "arguments": "{\\"a\\": 1}"}\n</tool_call>', [ToolCall("add", {"a": 1})]),
        ('<tool_call>{"name": "now"}</tool_call>', [ToolCall("now", {})]),
        (f"<think>{CALL}</think>The answer is 2.", []),  # a thought calls nothing
        (f"<think>so</think>{CALL}", [ToolCall("add", {"a": 1})]),
        ("the answer is 42", []),
        ("", []),
        ("</tool_call>", []),
        ("<tool_call>add(1)</tool_call>", [NO_JSON]),
        ("<tool_call>[1]</tool_call>", [ToolCall(fault=f"the call names no tool; write {FORM}")]),
        ('<tool_call>{"arguments": {}}</tool_call>', [ToolCall(fault=f"the call names no tool; write {FORM}")]),
        ('<tool_call>{"name": 3}</tool_call>', [ToolCall(fault=f"the call names no tool; write {FORM}")]),
        ('<tool_call>{"name": "add", ', [ToolCall(fault=f"the call is not closed; write {FORM}")]),
        (
            '<tool_call>{"name": "a", "arguments": "x"}</tool_call>',
            [NO_JSON],
        ),
        ('<tool_call>{"name": "a", "arguments": {"url": "\\ud83d"}}</tool_call>', [NO_JSON]),  # nobody could encode it
        ('<tool_call>{"name": "a", "arguments": [1]}</tool_call>', [ToolCall("a", [1])]),  # the box tells of it
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", [NO_JSON]),
        (f"<tool_call>{CALL}", [ToolCall(fault=f"the call is not closed; write {FORM}"), ToolCall("add", {"a": 1})]),
    ],
)
def test_tagged_calls(text: str, calls: list[ToolCall]) -> None:
    assert tagged_calls(text) == calls


def test_a_turn_makes_sixteen_calls_at_most() -> None:
    assert len(tagged_calls(CALL * 1000)) == 16
    assert len(plain_calls("add: 1\n" * 1000, {"add": "a"})) == 16


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("add: 1 + 2", [ToolCall("add", {"x": "1 + 2"})]),
        ("add:1\n", [ToolCall("add", {"x": "1"})]),
        ("run: a = 1\nprint(a)\nadd: 3", [ToolCall("run", {"code": "a = 1\nprint(a)"}), ToolCall("add", {"x": "3"})]),
        ("so\nadd: 1", [ToolCall("add", {"x": "1"})]),
        ("now:", [ToolCall("now", {})]),
        ("I add: 1", []),
        ("added: 1", []),
        ("<think>\nadd: 1\n</think>\n3", []),
        ("42", []),
        ("", []),
    ],
)
def test_plain_calls(text: str, calls: list[ToolCall]) -> None:
    assert plain_calls(text, {"add": "x", "run": "code", "now": None}) == calls
