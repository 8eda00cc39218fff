"""The environment of tools: what it starts with, answers and ends with, over both forms of calls."""

from __future__ import annotations

import pytest

from llmtrain.config.environment import EnvironmentConfig
from llmtrain.envs.build import environment_maker
from llmtrain.envs.calculator import CALCULATOR
from llmtrain.envs.toolbox import ToolBox
from llmtrain.envs.tools import ToolEnvironment

BOX = ToolBox([CALCULATOR])
CALL = '<tool_call>{{"name": "{}", "arguments": {{"expression": "{}"}}}}</tool_call>'


def test_it_starts_with_the_row() -> None:
    asked = [{"role": "user", "content": "6 * 7?"}]
    assert ToolEnvironment(BOX).start({"prompt": "6 * 7?", "answer": "42"}) == asked
    assert ToolEnvironment(BOX).start({"messages": asked, "answer": "42"}) == asked
    system = {"role": "system", "content": "Use the calculator."}
    assert ToolEnvironment(BOX, system="Use the calculator.").start({"prompt": "6 * 7?"}) == [system, *asked]
    with pytest.raises(ValueError, match=r"as has rollout.environment.system; remove one of them"):
        ToolEnvironment(BOX, system="s").start({"messages": [system, *asked]})
    with pytest.raises(ValueError, match="missing field 'prompt' or 'messages'"):
        ToolEnvironment(BOX).start({"answer": "42"})


def test_calls_are_answered_in_their_order() -> None:
    environment = ToolEnvironment(BOX)
    assert [tool["function"]["name"] for tool in environment.tools] == ["calculator"] and environment.role == "tool"
    reply = environment.step(
        CALL.format("calculator", "6*7") + CALL.format("calculator", "1/0") + CALL.format("cal", "1")
    )
    assert not reply.done and not reply.parts and not reply.errors
    assert reply.messages == [
        {"role": "tool", "name": "calculator", "content": "42"},
        {"role": "tool", "name": "calculator", "content": "error: division by zero"},
        {"role": "tool", "content": "error: there is no tool 'cal'; there is calculator"},
    ]
    (told,) = environment.step("<tool_call>6*7</tool_call>").messages
    assert told["content"].startswith("error: the call is no JSON; write <tool_call>")


def test_a_turn_without_a_call_is_the_answer() -> None:
    reply = ToolEnvironment(BOX).step("It is 42.")
    assert reply.done and not reply.messages


def test_the_plain_form() -> None:
    environment = ToolEnvironment(BOX, "plain", "user")
    assert environment.tools == ()  # which its model knows from demonstrations
    assert environment.step("calculator: 6*7").messages == [{"role": "user", "content": "42"}]
    assert environment.step("42").done


def test_settings_make_it() -> None:
    settings = EnvironmentConfig(tools=["calculator"], calls="plain", results="user", system="s", result_characters=3)
    environment = environment_maker(settings)()
    assert (environment.form, environment.role, environment.system) == ("plain", "user", "s")
    assert environment.step("calculator: 99*99").messages[0]["content"] == "980\n... 1 more characters"
