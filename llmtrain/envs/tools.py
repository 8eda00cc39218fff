"""Implements the environment in which a policy calls tools before it answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from llmtrain.config.data import DataConfig
from llmtrain.data.chat import Message
from llmtrain.data.rows import parse_row
from llmtrain.envs.base import Reply, ToolSchema
from llmtrain.envs.calls import ToolCall, plain_calls, tagged_calls
from llmtrain.envs.toolbox import ToolBox

AS_IT_IS = DataConfig()


class ToolEnvironment:
    """Answers the tool calls of a turn, each by a message with its result; a turn without one is the policy's answer,
    and ends the episode. It rewards nothing by itself: the rewards of the run read the answer.

    The box is shared by all episodes, and is closed by who made it.
    """

    players = 1

    def __init__(
        self,
        box: ToolBox,
        form: Literal["tags", "plain"] = "tags",
        role: Literal["tool", "user"] = "tool",
        system: str | None = None,
    ) -> None:
        """`system` comes before the messages of a row. In the plain form the template shows no tools: a small model
        knows them from demonstrations, or from `system`."""
        self.box, self.form, self.role, self.system = box, form, role, system
        self.tools: Sequence[ToolSchema] = box.schemas if form == "tags" else ()

    def start(self, example: Mapping[str, Any]) -> list[Message]:
        """Returns the row's `messages`, or its `prompt` as a user's message. Raises ValueError for a row with neither,
        or with a system message beside that of the configuration."""
        prompt = parse_row(dict(example), AS_IT_IS, answered=False).prompt
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt or [])
        if self.system is None:
            return messages
        if messages[0]["role"] == "system":
            raise ValueError("the row has a system message, as has rollout.environment.system; remove one of them")
        return [{"role": "system", "content": self.system}, *messages]

    def step(self, text: str) -> Reply:
        """Returns the results of the calls in a turn, in their order; without a call the episode is done."""
        calls = self.calls(text)
        if not calls:
            return Reply(done=True)
        return Reply([self.message(call) for call in calls])

    def calls(self, text: str) -> list[ToolCall]:
        """Returns the calls in a turn."""
        if self.form == "tags":
            return tagged_calls(text)
        return plain_calls(text, {name: next(iter(t.parameters), None) for name, t in self.box.tools.items()})

    def message(self, call: ToolCall) -> Message:
        """Returns the message that answers a call."""
        result = self.box.call(call.name, call.arguments) if call.fault is None else f"error: {call.fault}"
        named = {"name": call.name} if self.role == "tool" and call.name in self.box.tools else {}
        return {"role": self.role, **named, "content": result}

    def close(self) -> None:
        """Leaves the tools to who made them."""
