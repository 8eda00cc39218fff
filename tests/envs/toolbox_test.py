"""Tools: what they show, and what a call that is wrong is answered with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from llmtrain.envs.toolbox import Tool, ToolBox, ToolFault


def halve(arguments: Mapping[str, Any]) -> str:
    if arguments["x"] % 2:
        raise ToolFault(f"{arguments['x']} is odd")
    return str(arguments["x"] // 2)


X = {"x": {"type": "integer"}}
HALVE = Tool("halve", "Halves an even number.", X, halve)
REPEAT = Tool(
    "repeat",
    "Repeats a text.",
    {"text": {"type": "string"}, "times": {"type": "number"}},
    lambda arguments: arguments["text"] * int(arguments.get("times", 2)),
    required=("text",),
)
BOX = ToolBox([HALVE, REPEAT], most_characters=10)


def test_a_schema_is_that_of_the_openai_protocol() -> None:
    parameters = {"type": "object", "properties": X, "required": ["x"]}
    function = {"name": "halve", "description": "Halves an even number.", "parameters": parameters}
    assert BOX.schemas[0] == {"type": "function", "function": function}
    assert BOX.schemas[1]["function"]["parameters"]["required"] == ["text"]


@pytest.mark.parametrize(
    ("name", "arguments", "answer"),
    [
        ("halve", {"x": 84}, "42"),
        ("repeat", {"text": "ab"}, "abab"),
        ("repeat", {"text": "ab", "times": 3.0}, "ababab"),
        ("repeat", {"text": "a", "times": 13}, "aaaaaaaaaa\n... 3 more characters"),
        ("repeat", {"text": "a\ud83d"}, "a?a?"),  # half a character, which no tokenizer takes
        ("halve", {"x": 3}, "error: 3 i\n... 5 more characters"),
        ("halve", {}, "error: halve: the argument 'x' is missing"),
        ("halve", {"x": "4"}, "error: halve: the argument 'x' must be of type integer"),
        ("halve", {"x": True}, "error: halve: the argument 'x' must be of type integer"),
        ("halve", {"x": 4, "y": 1}, "error: halve: there is no argument 'y'; there is x"),
        ("halve", [4], "error: halve: the arguments must be an object"),
        ("halve", None, "error: halve: the arguments must be an object"),
        ("double", {"x": 4}, "error: there is no tool 'double'; there is halve, repeat"),
        ({"a": 1}, {}, "error: there is no tool \"{'a': 1}\"; there is halve, repeat"),
        (None, {}, "error: there is no tool 'None'; there is halve, repeat"),
    ],
)
def test_every_call_is_answered(name: Any, arguments: Any, answer: str) -> None:
    assert BOX.call(name, arguments) == answer


def test_a_box_closes_its_tools() -> None:
    closed: list[str] = []
    ToolBox([Tool("a", "", {}, lambda arguments: "", close=lambda: closed.append("a"))]).close()
    assert closed == ["a"]
