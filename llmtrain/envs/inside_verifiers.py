"""Runs environments of the library verifiers, in an interpreter of its own (launch/verifiers.sh): a program of
`rollout.agent` that plays one rollout of such an environment for each sample. It imports nothing of llmtrain.

    .venv-verifiers/bin/python -m llmtrain.envs.inside_verifiers ENVIRONMENT ROWS.jsonl ['{"name": "value"}']

writes the rows of an environment's data set, which is what `data.train` then names.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import verifiers
from openai import AsyncOpenAI

MODEL = "policy"  # any name will do


class Verifiers:
    """Plays rollouts of an environment, one after the other: `rollout.agent.function`, with `args` in the document.

    Example: Verifiers("my_env.py", {"most": 9})({"prompt": [...], "example_id": 0}, "http://...", "key") -> 1.0
    """

    def __init__(self, environment: str, args: Mapping[str, Any] | None = None) -> None:
        """`environment` is a file with `load_environment`, or the name of an installed one; `args` are its arguments.
        Raises ValueError for one whose rewards compare the rollouts of a group, as here each is played alone."""
        self.environment = environment_of(environment, args or {})
        if self.environment.requires_group_rollouts:
            raise ValueError(f"{environment}: rewards of a whole group are not supported; give each rollout its own")
        self.loop = asyncio.new_event_loop()  # one for all: what an environment keeps may belong to it

    def __call__(self, example: Mapping[str, Any], base_url: str, api_key: str) -> float:
        """Returns what the environment's rubric gives a rollout with this row. Raises RuntimeError when it fails."""
        return self.loop.run_until_complete(self._played(dict(example), base_url, api_key))

    async def _played(self, example: dict[str, Any], base_url: str, api_key: str) -> float:
        client = verifiers.OpenAIChatCompletionsClient(AsyncOpenAI(base_url=base_url, api_key=api_key, max_retries=0))
        try:
            output = await self.environment.run_rollout(example, client, MODEL, {})
        finally:
            await client.close()
        if output.get("error"):
            raise RuntimeError(output["error_chain"])
        return float(output["reward"])


def environment_of(name: str, args: Mapping[str, Any]) -> verifiers.Environment:
    """Returns what `load_environment` of a file, or of an installed environment of this name, makes of its
    arguments."""
    if not name.endswith(".py"):
        return verifiers.load_environment(name, **args)
    found = importlib.util.spec_from_file_location(Path(name).stem, os.path.abspath(name))
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module
    found.loader.exec_module(module)
    return module.load_environment(**args)


def main(environment: str, rows: str, args: str = "{}") -> None:
    """Writes the rows of an environment's data set, one a line."""
    found = environment_of(environment, json.loads(args)).get_dataset()
    Path(rows).parent.mkdir(parents=True, exist_ok=True)
    Path(rows).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found), encoding="utf-8")
    print(f"{rows}: {len(found)} rows")


if __name__ == "__main__":
    main(*sys.argv[1:])
