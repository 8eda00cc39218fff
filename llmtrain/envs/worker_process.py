"""Runs a process that plays episodes or runs of an agent for a trainer: `python -m llmtrain.envs.worker_process`.

It is `rollout/worker_process.py` with an environment, or a program, between prompts and generator. What the environment
starts (workers of the sandbox, MCP servers), and the processes of the program, belong to this process and end with it.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

from llmtrain.config.sampling import RolloutConfig
from llmtrain.data.tokenizer import Tokenizer, load_tokenizer
from llmtrain.envs.agents import Agents
from llmtrain.envs.build import environment_maker
from llmtrain.envs.dialogue import Renderer
from llmtrain.envs.episodes import Episodes
from llmtrain.envs.program import Program
from llmtrain.rollout.native import NativeGenerator
from llmtrain.rollout.vllm import VllmGenerator
from llmtrain.rollout.worker_process import build_generator, opened, serve


def playing_over(settings: dict[str, Any], generator: NativeGenerator | VllmGenerator) -> Episodes | Agents:
    """Returns what plays the episodes, or the runs of the program, that the trainer describes. Raises ValueError for a
    program that cannot be loaded."""
    tokenizer = load_tokenizer(settings["tokenizer"], settings["chat_template"], settings["chat_template_kwargs"])
    rollout = RolloutConfig.model_validate(settings["rollout"])
    if rollout.agent is None:
        return episodes_over(settings, rollout, tokenizer, generator)
    program = Program(rollout.agent)
    program.start()
    return Agents(generator, tokenizer, program, settings["rewarded"], rollout.agent.processes)


def episodes_over(
    settings: dict[str, Any], rollout: RolloutConfig, tokenizer: Tokenizer, generator: NativeGenerator | VllmGenerator
) -> Episodes:
    """Returns what plays the episodes."""
    own, decode = rollout.environment, partial(tokenizer.decode, skip_special=rollout.skip_special_tokens)
    assert own is not None
    return Episodes(generator, Renderer(tokenizer), environment_maker(own), own, settings["max_seq_tokens"], decode)


if __name__ == "__main__":
    serve(opened(sys.argv[1:]), build_generator, playing_over)
