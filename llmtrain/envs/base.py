"""Defines the contract of environments: what a policy talks to in an episode, text in, text out, without tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from llmtrain.data.chat import Message

ToolSchema = dict[str, Any]
"""Describes a tool as the OpenAI protocol does: {"type": "function", "function": {"name", "description",
"parameters": a JSON schema}}."""


@dataclass
class Reply:
    """Holds what an environment answers to a turn of the policy.

    Example: a calculator has answered `21 * 2`, and the episode goes on:
        Reply([{"role": "tool", "name": "calculator", "content": "42"}])
    In a game of two the second player (1) has won with this turn:
        Reply(done=True, parts={"outcome": 1.0}, parts_of={0: {"outcome": -1.0}})
    A long conversation is summed up, and the policy goes on from there, in a new row:
        Reply(history=[{"role": "user", "content": "Find the bug. So far you have read a.py."}])
    """

    messages: list[Message] = field(default_factory=list)  # user or tool turns; empty where the episode is done
    parts: dict[str, float] = field(default_factory=dict)  # rewards by name, added to those of earlier turns
    done: bool = False  # the policy does not speak again
    errors: dict[str, str] = field(default_factory=dict)  # why a part could not be scored, by its name
    player: int = 0  # who speaks next; `messages` are all that this one has not seen yet
    parts_of: dict[int, dict[str, float]] = field(default_factory=dict)  # rewards of those who did not speak
    history: list[Message] | None = None  # all that who speaks next sees from now on, in place of `messages`: a new row


class Environment(Protocol):
    """Holds one episode; a new object is made for each sample. docs/rollouts/environments.md has an example."""

    tools: Sequence[ToolSchema]  # what the chat template shows the policy; empty = none
    role: Literal["user", "tool"]  # of the messages that it answers with
    players: int  # 1, or how many sides the policy plays, each with a conversation of its own

    def start(self, example: Mapping[str, Any]) -> list[Message]:
        """Returns the conversation up to the first turn of player 0. `example` is a row of the problem file, and the
        same row always starts the same conversation. Raises ValueError, with the remedy, for a row that is wrong."""

    def step(self, text: str) -> Reply:
        """Returns the answer to a turn of the policy, decoded as rewards read it. Text that asks for nothing, or for a
        tool that there is not, is answered too: what a policy writes raises nothing. It may have been cut off at a
        limit; then the episode ends here, whatever the answer."""

    def close(self) -> None:
        """Ends what the episode started (processes, connections)."""
