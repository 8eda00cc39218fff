"""Makes the environments that `rollout.environment` names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from llmtrain.config.environment import EnvironmentConfig, McpConfig
from llmtrain.envs.base import Environment
from llmtrain.envs.calculator import CALCULATOR
from llmtrain.envs.mcp import McpServer
from llmtrain.envs.nim import Nim
from llmtrain.envs.python_tool import python_tool
from llmtrain.envs.search import search_tool
from llmtrain.envs.toolbox import Tool, ToolBox
from llmtrain.envs.tools import ToolEnvironment
from llmtrain.envs.web import fetch_tool, web_search_tool
from llmtrain.rewards.scorer import absolute
from llmtrain.sandbox.server import load

Make = Callable[[], Environment]
"""Makes the environment of one episode."""

MAKERS: dict[str, Callable[[EnvironmentConfig], Tool]] = {
    "calculator": lambda settings: CALCULATOR,
    "python": lambda settings: python_tool(settings.deadline_s),
    "search": lambda settings: search_tool(settings.search),
    "fetch": lambda settings: fetch_tool(settings.web),
    "web_search": lambda settings: web_search_tool(settings.web),
}
"""Maps the names in `rollout.environment.tools` to what makes the tool, once for all episodes of a rank."""
GAMES: dict[str, Callable[..., Environment]] = {"nim": Nim}


def environment_maker(settings: EnvironmentConfig) -> Make:
    """Returns what makes an environment for each episode; what they share, as workers of the sandbox, starts now.

    Raises ValueError for a class of the user's that cannot be loaded or made, RuntimeError where there is no sandbox.
    """
    if settings.function is not None:
        return own_maker(settings)
    if settings.game is not None:
        return maker(GAMES[settings.game], settings.args, f"rollout.environment.game={settings.game}")
    tools = [MAKERS[name](settings) for name in settings.tools]
    for server in settings.mcp:
        tools += mcp_tools(server, settings.deadline_s, [tool.name for tool in tools])
    box = ToolBox(tools, settings.result_characters)
    return lambda: ToolEnvironment(box, settings.calls, settings.results, settings.system)


def mcp_tools(settings: McpConfig, deadline_s: float, taken: Sequence[str]) -> list[Tool]:
    """Starts an MCP server and returns its tools. Raises ValueError when it does not start, lacks a tool that is named,
    or has one with a name that is `taken`."""
    key = f"rollout.environment.mcp.{settings.name}"
    try:
        server = McpServer(settings.name, settings.command, settings.env, deadline_s)
        tools = server.tools(settings.tools)
    except ModuleNotFoundError as error:
        raise ValueError(f"{key}: needs the package {error.name}; pip install 'llmtrain[mcp]'") from error
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
    if twice := [tool.name for tool in tools if tool.name in taken]:
        raise ValueError(f"{key}: has a tool {twice[0]}, and so has another; name those that you want in its `tools`")
    return tools


def own_maker(settings: EnvironmentConfig) -> Make:
    """Returns what makes the user's own environment, which runs in this process."""
    key = f"rollout.environment.function={settings.function}"
    try:
        kind = load(absolute(settings.function))
    except (Exception, SystemExit) as error:  # of any kind: it is the user's own code
        raise ValueError(f"{key}: cannot be loaded: {type(error).__name__}: {error}; mend it") from error
    return maker(kind, settings.args, key)


def maker(kind: Callable[..., Environment], args: dict[str, Any], key: str) -> Make:
    """Returns what makes an environment of a class. One is made now, as a trial."""
    try:
        trial = kind(**args)
    except (Exception, SystemExit) as error:  # as above
        raise ValueError(f"{key}: cannot be made: {type(error).__name__}: {error}; mend it, or its args") from error
    missing = [name for name in ("tools", "role", "players", "start", "step", "close") if not hasattr(trial, name)]
    if missing:
        raise ValueError(f"{key}: has no {', '.join(missing)}, which llmtrain/envs/base.py asks for; add them")
    trial.close()
    return partial(kind, **args)
