"""Defines the keys of an agent: a program of the user's that talks to the policy over the OpenAI protocol."""

from __future__ import annotations

from typing import Any

from pydantic import Field, PositiveInt

from llmtrain.config.section import DeadlineS, OwnCode, Section, Share, UserPath, file_of


class AgentConfig(Section):
    """Names a program that is trained as it is; see docs/rollouts/serve.md. It runs as your own code does, outside of
    the sandbox."""

    function: OwnCode | None = None  # my_agent.py:run or package.module:run, called as run(example, base_url, api_key)
    args: dict[str, Any] | None = None  # keyword arguments: function(**args) makes what is called so; null = itself is
    python: UserPath | None = None  # interpreter that `function` runs in, with packages of its own; null = this one
    command: list[str] = Field([])  # or a program: the example on stdin, OPENAI_BASE_URL and OPENAI_API_KEY set
    deadline_s: DeadlineS = 300.0  # for one sample; later it is ended, and an error of that sample
    processes: PositiveInt = 8  # that run at the same time on a rank, or for a worker that samples ahead
    weights: dict[str, float] = Field({})  # of the rewards that it returns, in the sum; others: 1
    max_error_share: Share = 0.5  # of the samples of a step in which it fails; above it the run stops

    @property
    def file(self) -> str | None:
        """Returns the file that `function` is in, None where it is in a module or there is none."""
        return file_of(self.function)
