"""Puts the environment of `rollout.environment`, or the program of `rollout.agent`, between prompts and generator."""

from __future__ import annotations

import functools

from llmtrain.config.agent import AgentConfig
from llmtrain.config.environment import EnvironmentConfig
from llmtrain.config.schema import Config
from llmtrain.data.prompts import PromptSet
from llmtrain.data.tokenizer import Tokenizer
from llmtrain.envs.agents import Agents
from llmtrain.envs.build import Make, environment_maker
from llmtrain.envs.dialogue import Renderer
from llmtrain.envs.episodes import Episodes
from llmtrain.envs.program import Program
from llmtrain.envs.starts import examples, starts_of
from llmtrain.rollout.generator import Generator
from llmtrain.rollout.native import NativeGenerator
from llmtrain.rollout.vllm import VllmGenerator
from llmtrain.trainer.completions import completion_text


@functools.cache
def _made(settings: str) -> Make:
    return environment_maker(EnvironmentConfig.model_validate_json(settings))


def make_of(settings: EnvironmentConfig) -> Make:
    """Returns what makes the environment of an episode; equal settings share their tools and workers in a process."""
    return _made(settings.model_dump_json())


@functools.cache
def _program(settings: str) -> Program:
    return Program(AgentConfig.model_validate_json(settings))


def program_of(settings: AgentConfig) -> Program:
    """Returns the program of an agent; equal settings share its processes."""
    return _program(settings.model_dump_json())


def prompts_of(config: Config, path: str, tokenizer: Tokenizer) -> PromptSet:
    """Returns the prompts of a file, each of which leaves room for `rollout.max_new_tokens` in a row. Where there is an
    environment, they are what its episodes begin with; an agent is given the rows alone. It is started here, so that
    one that cannot be loaded is refused, and ended again where others run it; in a replay nobody does."""
    seq_len, new, settings = config.train.seq_len, config.rollout.max_new_tokens, config.rollout.environment
    room = f"train.seq_len={seq_len} less rollout.max_new_tokens={new}"
    starts = None
    if settings is not None:
        starts = starts_of(make_of(settings), settings.keep_thinking, settings.rewritten == "new_row")
    if (agent := config.rollout.agent) is not None:
        program, starts = program_of(agent), examples
        if config.rollout.replay is None:
            program.start()
        if config.rollout.placement != "colocated":
            program.close()
    return PromptSet(path, tokenizer, seq_len - new, config.data, room, starts)


def answering(config: Config, tokenizer: Tokenizer, generator: Generator) -> Generator | Episodes:
    """Returns what answers prompts by `generate`: the generator itself, or episodes over it."""
    settings = config.rollout.environment
    if settings is None:
        return generator
    decode = completion_text(config, tokenizer)
    return Episodes(generator, Renderer(tokenizer), make_of(settings), settings, config.train.seq_len, decode)


def with_agent(
    config: Config, tokenizer: Tokenizer, generator: NativeGenerator | VllmGenerator
) -> NativeGenerator | VllmGenerator | Agents:
    """Returns the generator, or runs of an agent over it."""
    settings = config.rollout.agent
    if settings is None:
        return generator
    return Agents(generator, tokenizer, program_of(settings), bool(config.rewards), settings.processes)
