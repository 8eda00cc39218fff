"""Adapts environments behind an OpenEnv server, for `rollout.environment.function: llmtrain.envs.openenv:OpenEnv`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llmtrain.config.data import DataConfig
from llmtrain.data.chat import Message
from llmtrain.data.rows import parse_row
from llmtrain.envs.base import Reply, ToolSchema

AS_IT_IS = DataConfig()


class OpenEnv:
    """Plays one episode of an environment on a server: what the policy writes becomes a field of an action, and a field
    of each observation is what it reads. The row's own prompt, if it has one, comes before the first observation.

    Example: OpenEnv("http://127.0.0.1:8000", action="guess", observation="message", reset=["seed"])
    """

    tools: Sequence[ToolSchema] = ()
    role = "user"
    players = 1

    def __init__(
        self,
        url: str,
        action: str = "message",
        observation: str = "message",
        reset: Sequence[str] = ("seed",),
        part: str = "openenv",
    ) -> None:
        """`reset` names the fields of a row that the server's reset is given, so that the same row always starts the
        same episode; `part` names the reward. Raises ImportError without the package openenv-core."""
        from openenv.core.generic_client import GenericEnvClient

        self.action, self.observation, self.fields, self.part = action, observation, tuple(reset), part
        self.client = GenericEnvClient(base_url=url).sync()

    def start(self, example: Mapping[str, Any]) -> list[Message]:
        """Returns the row's prompt and the first observation. Raises ValueError for a row without a field of
        `reset`."""
        if missing := [name for name in self.fields if name not in example]:
            raise ValueError(f"the row has no {missing[0]!r}, which the environment's reset is given; add it")
        self.client.connect()
        first = self.client.reset(**{name: example[name] for name in self.fields})
        said = {"role": "user", "content": self._text(first.observation)}
        if not {"prompt", "messages", "question"} & example.keys():
            return [said]
        prompt = parse_row(dict(example), AS_IT_IS, answered=False).prompt
        before = [{"role": "system", "content": prompt}] if isinstance(prompt, str) else list(prompt or [])
        return [*before, said]

    def step(self, text: str) -> Reply:
        """Returns the observation behind an action, and its reward."""
        result = self.client.step({self.action: text})
        parts = {} if result.reward is None else {self.part: float(result.reward)}
        if result.done:
            return Reply(done=True, parts=parts)
        return Reply([{"role": "user", "content": self._text(result.observation)}], parts)

    def close(self) -> None:
        """Ends the session on the server."""
        self.client.close()

    def _text(self, observation: Mapping[str, Any]) -> str:
        """Returns what the policy reads. Raises ValueError for an observation without the field."""
        if self.observation not in observation:
            there = ", ".join(observation)
            raise ValueError(f"the observation has no field {self.observation!r}, it has {there}; name one of them")
        value = observation[self.observation]
        return value if isinstance(value, str) else json.dumps(value)
