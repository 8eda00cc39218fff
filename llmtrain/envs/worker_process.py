"""Runs a process that plays episodes for a trainer: `python -m llmtrain.envs.worker_process SOCKET PARENT`.

It is `rollout/worker_process.py` with an environment between prompts and generator. What the environment starts
(workers of the sandbox, MCP servers) belongs to this process.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

from llmtrain.config.sampling import RolloutConfig
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.envs.build import environment_maker
from llmtrain.envs.dialogue import Renderer
from llmtrain.envs.episodes import Episodes
from llmtrain.rollout.generator import Generator
from llmtrain.rollout.worker_process import build_generator, opened, serve


def episodes_over(settings: dict[str, Any], generator: Generator) -> Episodes:
    """Returns what plays the episodes that the trainer describes."""
    tokenizer = load_tokenizer(settings["tokenizer"], settings["chat_template"], settings["chat_template_kwargs"])
    rollout = RolloutConfig.model_validate(settings["rollout"])
    own, decode = rollout.environment, partial(tokenizer.decode, skip_special=rollout.skip_special_tokens)
    assert own is not None
    return Episodes(generator, Renderer(tokenizer), environment_maker(own), own, settings["max_seq_tokens"], decode)


if __name__ == "__main__":
    serve(opened(sys.argv[1:]), build_generator, episodes_over)
