"""Tool calls in what a model wrote, whole and in pieces."""

from __future__ import annotations

import pytest

from llmtrain.data.calls import Call, CallStream

ADD = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        ("No call <tool", "No call <tool", []),
        (f"So:\n{ADD}", "So:", [Call("add", {"a": 1})]),
        (f"{ADD}\n{ADD}\nDone ", "Done ", [Call("add", {"a": 1})] * 2),
        ('<tool_call>{"name": "f"}</tool_call>', "", [Call("f", {})]),
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [Call("f", {"a": 1})]),
        ("<tool_call>{}</tool_call> x", "<tool_call>{}</tool_call> x", []),
        ("<tool_call>[1]</tool_call>", "<tool_call>[1]</tool_call>", []),
        ("<tool_call>{bad</tool_call>", "<tool_call>{bad</tool_call>", []),
        ('<tool_call>{"name": "f", "arguments": "x"}</tool_call>', None, []),
        ('<tool_call>{"name": "f", "arguments": {"a": "\\ud83d"}}</tool_call>', None, []),  # nobody could encode it
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\": \\"\\\\ud83d\\"}"}</tool_call>', None, []),
        (f"a {ADD[:-3]}", f"a {ADD[:-3]}", []),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", None, []),
        (f"<think>{ADD}</think>\n{ADD}", f"<think>{ADD}</think>", [Call("add", {"a": 1})]),
        (f"a <think> {ADD}\n{ADD} b</think> c", None, []),
        (f"<think>{ADD}", None, []),  # it was cut
        (f"{ADD}<think>{ADD}</think>{ADD}", f"<think>{ADD}</think>", [Call("add", {"a": 1})] * 2),
        (f"</think>{ADD}", "</think>", [Call("add", {"a": 1})]),
        ('<tool_call>{"name": "<think>"}</tool_call>', "", [Call("<think>", {})]),
        ("", "", []),
        ("a  ", "a  ", []),
    ],
)
def test_calls_are_told_from_text_in_pieces_of_any_size(text: str, said: str | None, calls: list[Call]) -> None:
    expected = (text if said is None else said, calls)
    assert read(CallStream(), text, len(text) + 1) == expected
    for size in (1, 7) if len(text) < 1000 else ():
        assert read(CallStream(), text, size) == expected


def read(stream: CallStream, text: str, size: int) -> tuple[str, list[Call]]:
    """Returns what a stream tells of a text in pieces of this size."""
    got, found = "", []
    for at in range(0, len(text), size):
        piece, more = stream.push(text[at : at + size])
        got, found = got + piece, found + more
    return got + stream.rest(), found


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_text_may_begin_within_a_thought(size: int) -> None:
    """Templates open it in the prompt."""
    assert read(CallStream(thinking=True), f"{ADD} so</think>{ADD}", size) == (
        f"{ADD} so</think>",
        [Call("add", {"a": 1})],
    )
    assert read(CallStream(thinking=True), ADD, size) == (ADD, [])


def test_text_comes_as_soon_as_it_is_sure() -> None:
    stream = CallStream()
    assert stream.push("I say <b> and") == ("I say <b> and", [])
    assert stream.push(" <tool") == ("", [])
    assert stream.push("box>") == (" <toolbox>", [])
    stream = CallStream(thinking=True)
    assert stream.push("I add <tool_call> 1") == ("I add <tool_call> 1", [])
    assert stream.push(" </thi") == ("", [])
