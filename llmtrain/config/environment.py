"""Defines the keys of an environment: what the policy talks to in an episode of several turns."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveInt

from llmtrain.config.retrieval import StoreConfig, WebConfig
from llmtrain.config.section import DeadlineS, OwnCode, Section, Share, file_of

ALL_SIDES = (
    "the policy plays all sides, so one of them wins each episode whatever it knows; evaluate in an environment of "
    "your own in which it meets another player, or set eval.problems=0"
)

ToolName = Literal["calculator", "python", "search", "fetch", "web_search"]


class McpConfig(Section):
    """Names an MCP server: a program of yours that speaks the Model Context Protocol over its standard input and
    output, and whose tools the policy may call."""

    name: str  # for messages
    command: list[str] = Field(min_length=1)  # the program and its arguments, as [python, my_server.py]
    env: dict[str, str] = Field({})  # variables of its environment, beside HOME, PATH and the like
    tools: list[str] | None = None  # those of its tools that the policy has; null = all
    unsandboxed: bool = False  # yes, it may run with all that you may do, on arguments that a policy wrote


class EnvironmentConfig(Section):
    """Names what the policy talks to: tools, a game or a class of your own; see docs/rollouts/environments.md."""

    tools: list[ToolName] = Field([])  # what the policy may call before it answers
    mcp: list[McpConfig] = Field([])  # servers whose tools it may call beside those
    game: Literal["nim"] | None = None  # the policy plays all sides; rows of the problem file say how it starts
    function: OwnCode | None = None  # your own: my_env.py:Class or package.module:Class
    args: dict[str, Any] = Field({})  # keyword arguments of that class, or of the game
    unsandboxed: bool = False  # with `function`: yes, it may run with all that you may do, as it has state to keep
    max_turns: PositiveInt = 8  # turns of the policy in an episode, of all sides of a game together
    calls: Literal["tags", "plain"] = "tags"  # tags: <tool_call>{JSON}</tool_call>; plain: a line `name: argument`
    results: Literal["tool", "user"] = "tool"  # role of the messages with results, for the chat template
    system: str | None = None  # a system message before those of every row
    result_characters: PositiveInt = 2000  # longest result of a tool; more is cut off
    deadline_s: DeadlineS = 5.0  # for one call of the tool python, or of one of an MCP server
    search: StoreConfig | None = None  # the store of the tool search
    web: WebConfig | None = None  # what the tools fetch and web_search may reach
    weights: dict[str, float] = Field({})  # of parts that the environment rewards, in the sum; others: 1
    max_error_share: Share = 0.5  # of the episodes of a step in which the environment fails; above it the run stops
    keep_thinking: bool = False  # episodes keep what the policy thought, also where the chat template would drop it
    rewritten: Literal["refuse", "new_row"] = "refuse"  # earlier turns that the template renders in another way later
    threads: PositiveInt = 8  # episodes of a rank that are answered at the same time

    @property
    def file(self) -> str | None:
        """Returns the file that `function` is in, None where it is in a module or there is none."""
        return file_of(self.function)
