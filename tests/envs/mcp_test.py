"""Tools of a real MCP server, which fails in all ways."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

pytest.importorskip("mcp")

from llmtrain.config.environment import EnvironmentConfig
from llmtrain.envs.build import environment_maker
from llmtrain.envs.mcp import McpServer
from llmtrain.envs.toolbox import Tool, ToolBox, ToolFault, argument_faults

COMMAND = [sys.executable, str(Path(__file__).with_name("mcp_server.py"))]


def children() -> set[int]:
    return {each.pid for each in psutil.Process().children(recursive=True)}


def started(deadline_s: float = 20.0) -> tuple[McpServer, int]:
    """A server, and the id of its process."""
    before = children()
    server = McpServer("test", COMMAND, {"OURS": "yes", "PYTHONPATH": os.pathsep.join(sys.path)}, deadline_s)
    (process,) = children() - before
    return server, process


@pytest.fixture(scope="module")
def server() -> Iterator[McpServer]:
    found, process = started()
    yield found
    found.close()
    assert process not in children()


def tool(server: McpServer, name: str) -> Tool:
    return server.tools([name])[0]


def test_tools_have_their_schemas(server: McpServer) -> None:
    add, wait = server.tools(["add", "wait"])
    assert (add.name, add.description, add.required) == ("add", "Adds two integers.", ("a",))
    assert {name: each["type"] for name, each in add.parameters.items()} == {"a": "integer", "b": "integer"}
    assert wait.schema["function"]["parameters"]["required"] == ["seconds"]
    assert [each.name for each in server.tools()] == ["add", "fail", "wait", "die", "environment"]
    with pytest.raises(ValueError, match="has no tool sub; it has add, fail"):
        server.tools(["sub"])


def test_calls(server: McpServer) -> None:
    box = ToolBox(server.tools())
    assert box.call("add", {"a": 20, "b": 22}) == "42" and box.call("add", {"a": 1}) == "2"
    assert box.call("add", {}) == "error: add: the argument 'a' is missing"
    assert box.call("fail", {"text": "q"}).startswith("error: ")
    with pytest.raises(ToolFault, match="valid integer"):
        tool(server, "add").call({"a": "x"})


def test_a_slow_call_ends_alone() -> None:
    server, _ = started(2.0)
    start = time.monotonic()
    with pytest.raises(ToolFault, match="wait: took longer than 2 s"):
        tool(server, "wait").call({"seconds": 60.0})
    assert time.monotonic() - start < 30
    server.deadline_s = 20.0
    assert tool(server, "add").call({"a": 1}) == "2"
    server.close()


def test_the_environment_is_not_passed_on(server: McpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_THE_RUN", "x")  # a server that starts now has as little
    other, _ = started()
    for each in (server, other):
        assert tool(each, "environment").call({"name": "OURS"}) == "yes"
        assert tool(each, "environment").call({"name": "SECRET_OF_THE_RUN"}) == ""
    other.close()


def test_a_program_that_dies_is_a_failure_with_its_words() -> None:
    server, process = started()
    with pytest.raises(RuntimeError, match=r"(?s)MCP server test, tool die: .*it said:.*dying"):
        tool(server, "die").call({})
    with pytest.raises(RuntimeError, match="MCP server test, tool add"):
        tool(server, "add").call({"a": 1})
    server.close()
    assert process not in children()


def test_a_stopped_program_is_ended() -> None:
    server, process = started(1.0)
    os.kill(process, signal.SIGSTOP)
    with pytest.raises(ToolFault, match="took longer"):
        tool(server, "add").call({"a": 1})
    server.close()
    assert process not in children()


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["/there/is/none"], "No such file"),
        ([sys.executable, "-c", "import sys; sys.exit('a bad start')"], "a bad start"),
        ([sys.executable, "-c", "print('<html>')"], "MCPError"),
    ],
)
def test_what_is_no_server_is_refused(command: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=f"(?s)MCP server bad .*{said}"):
        McpServer("bad", command, {}, 2.0)


def test_the_tools_of_a_document() -> None:
    """Beside ours, those that are named; two of one name are refused."""
    env = {"PYTHONPATH": os.pathsep.join(sys.path)}
    server = {"name": "files", "command": COMMAND, "env": env, "unsandboxed": True}
    settings = EnvironmentConfig(tools=["calculator"], mcp=[{**server, "tools": ["add"]}])
    environment = environment_maker(settings)()
    assert [each["function"]["name"] for each in environment.tools] == ["calculator", "add"]
    reply = environment.step('<tool_call>{"name": "add", "arguments": {"a": 4, "b": 5}}</tool_call>')
    assert reply.messages[0]["content"] == "9" and not reply.done
    environment.box.close()
    twice = EnvironmentConfig(mcp=[{**server, "tools": ["add"]}, {**server, "name": "more"}])
    with pytest.raises(ValueError, match=r"rollout.environment.mcp.more: has a tool add, and so has another"):
        environment_maker(twice)
    with pytest.raises(ValueError, match=r"rollout.environment.mcp.files: MCP server files: has no tool sub"):
        environment_maker(EnvironmentConfig(mcp=[{**server, "tools": ["sub"]}]))


def test_a_property_that_may_be_anything() -> None:
    """JSON schema allows `true` in place of an object."""
    listed = SimpleNamespace(name="f", description=None, input_schema={"properties": {"x": True}})
    found = McpServer._tool(None, listed)
    assert found.parameters == {"x": {}} and found.required == ()
    assert list(argument_faults(found, {"x": [1]})) == []
