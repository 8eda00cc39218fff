"""Defines the contract of environments: what a policy talks to in an episode, text in, text out, without tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from llmtrain.data.chat import Message

ToolSchema = dict[str, Any]
"""Describes a tool as the OpenAI protocol does: {"type": "function", "function": {"name", "description",
"parameters": a JSON schema}}."""


@dataclass
class Reply:
    """Holds what an environment answers to a turn of the policy.

    Example: a calculator has answered `21 * 2`, and the episode goes on:
        Reply([{"role": "tool", "name": "calculator", "content": "42"}])
    """

    messages: list[Message] = field(default_factory=list)  # user or tool turns; empty where the episode is done
    parts: dict[str, float] = field(default_factory=dict)  # rewards by name, added to those of earlier turns
    done: bool = False  # the policy does not speak again
    errors: dict[str, str] = field(default_factory=dict)  # why a part could not be scored, by its name


class Environment(Protocol):
    """Holds one episode; a new object is made for each sample."""

    tools: Sequence[ToolSchema]  # what the chat template shows the policy; empty = none

    def start(self, example: Mapping[str, Any]) -> list[Message]:
        """Returns the conversation up to the policy's first turn. `example` is a row of the problem file."""

    def step(self, text: str) -> Reply:
        """Returns the answer to a turn of the policy, decoded as rewards read it. Text that asks for nothing, or for a
        tool that there is not, is answered too: what a policy writes raises nothing."""

    def close(self) -> None:
        """Ends what the episode started (processes, connections)."""
