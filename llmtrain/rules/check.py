"""Checks the rules that span several keys, before any process group exists. Each says value, rule and remedy."""

from __future__ import annotations

import os
from collections.abc import Container, Iterator
from dataclasses import replace

from llmtrain.arch.resolve import resolve_model
from llmtrain.config.hub import located
from llmtrain.config.load import ConfigError, stage_config
from llmtrain.config.ramp import phases, trained_model, with_phase
from llmtrain.config.schema import Config, ModelConfig, RunConfig, StageConfig
from llmtrain.rules.agent import AGENT_RULES
from llmtrain.rules.ahead import AHEAD_RULES
from llmtrain.rules.attention import ATTENTION_RULES, PACKAGE_RULES
from llmtrain.rules.case import Case, Earlier, Rules, pretrains
from llmtrain.rules.cleaning import CLEANING_RULES
from llmtrain.rules.curriculum import CURRICULUM_RULES
from llmtrain.rules.environment import ENVIRONMENT_RULES
from llmtrain.rules.files import FILE_RULES, KEY_RULES
from llmtrain.rules.index import INDEX_RULES
from llmtrain.rules.judging import JUDGING_RULES
from llmtrain.rules.ladder import LADDER_RULES
from llmtrain.rules.layout import LAYOUT_RULES
from llmtrain.rules.lora import LORA_RULES
from llmtrain.rules.mix import MIX_RULES
from llmtrain.rules.model import MODEL_RULES
from llmtrain.rules.others import other_models
from llmtrain.rules.plan import PLAN_RULES
from llmtrain.rules.replay import REPLAY_RULES
from llmtrain.rules.scaling import SCALING_RULES
from llmtrain.rules.tasks import TASK_RULES
from llmtrain.rules.testtime import TEST_TIME_RULES
from llmtrain.rules.vllm import VLLM_RULES
from llmtrain.rules.vocabulary import VOCABULARY_RULES

SHAPE_RULES = (*LAYOUT_RULES, *MODEL_RULES, *ATTENTION_RULES, *LORA_RULES)  # of a layout
PLANNED_RULES = (  # that `llmtrain plan` asks for of a document of one stage, which may have no data yet
    *(*SHAPE_RULES, *KEY_RULES, *VOCABULARY_RULES, *MIX_RULES, *CURRICULUM_RULES, *ENVIRONMENT_RULES, *VLLM_RULES),
    *(*AHEAD_RULES, *REPLAY_RULES, *AGENT_RULES, *JUDGING_RULES, *TASK_RULES, *TEST_TIME_RULES),
)
RULES = (
    *SHAPE_RULES,
    *(*VOCABULARY_RULES, *FILE_RULES, *MIX_RULES, *CLEANING_RULES, *JUDGING_RULES, *SCALING_RULES),
    *(*CURRICULUM_RULES, *TASK_RULES, *TEST_TIME_RULES, *LADDER_RULES, *PLAN_RULES, *INDEX_RULES),
    *(*ENVIRONMENT_RULES, *VLLM_RULES, *AHEAD_RULES, *REPLAY_RULES, *AGENT_RULES, *PACKAGE_RULES),
)


def check(config: Config, world_size: int, command: str) -> None:
    """Refuses a configuration that cannot work. A run document is checked stage by stage, each with its own ranks.

    Raises ConfigError with one line for each violation: `key=value: rule; remedy`.
    """
    if isinstance(config, RunConfig):
        found = _run_violations(config, world_size, command)
    else:
        found = violations(config, world_size, command, planned=command == "plan")
    if found:
        raise ConfigError("\n".join(found))


def violations(
    config: Config,
    world_size: int,
    command: str,
    run_dir: str | None = None,
    earlier: Earlier | None = None,
    planned: bool = False,
) -> list[str]:
    """Returns all broken rules of one stage; `run_dir` and `earlier` are given only where it is a stage of a run.
    `planned`: see `Case`."""
    found: list[str] = []
    model = None
    absent = config.model.init_from is not None and not os.path.exists(config.model.init_from)
    try:
        model = resolve_model(config.model, earlier)
    except ValueError as error:
        if not absent:  # a missing directory is the business of `_init_from`
            found += str(error).splitlines()
    case = Case(config, model, world_size, command, run_dir, earlier or {}, planned)
    found += _broken(case)
    found += _of_others(case, found)
    for phase in phases(config.train)[1:] if pretrains(case) or command == "plan" else ():
        lines = _broken(replace(case, config=with_phase(config, phase)))
        found += [f"train ramp from token {phase.first_token}: {line}" for line in lines if line not in found]
    return found


def planned_violations(
    config: Config,
    model: ModelConfig,
    world_size: int,
    command: str,
    earlier: Earlier,
    rules: Rules = PLANNED_RULES,
) -> list[str]:
    """Returns which of some rules a command breaks in any phase of a ramp; with those of a layout, also which models
    beside the main one do not fit it. `llmtrain plan` asks, whose document of one stage names its command by a section
    alone."""
    found: dict[str, None] = {}
    for phase in phases(config.train):
        case = Case(with_phase(config, phase), model, world_size, command, None, earlier, planned=True)
        found |= dict.fromkeys(_broken(case, rules))
        found |= dict.fromkeys(_of_others(case, found) if SHAPE_RULES[0] in rules else ())
    return list(found)


def _of_others(case: Case, found: Container[str]) -> list[str]:
    """Returns what is wrong with the models beside the main one alone."""
    return [line for line in other_models(case) if line.partition(": ")[2] not in found]


def _broken(case: Case, rules: Rules = RULES) -> Iterator[str]:
    for holds, rule in rules:
        if holds(case):
            yield from rule(case)


def _run_violations(run: RunConfig, world_size: int, command: str) -> list[str]:
    if command not in ("run", "plan", "report"):
        return [f"stages: {command} takes one stage; start this document with `llmtrain run`, or remove `stages:`"]
    if command == "run" and world_size > 1:
        return [f"WORLD_SIZE={world_size}: run starts the processes of its stages itself; call it without torchrun"]
    found: list[str] = []
    for stage, config, earlier in planned_stages(run, weights=command == "run"):
        planned = command == "plan"
        lines = violations(config, stage.ranks, stage.command, run.directory, earlier, planned)
        found += [f"stages.{stage.name}: {line}" for line in lines]
    return found


def planned_stages(run: RunConfig, weights: bool = False) -> Iterator[tuple[StageConfig, Config, Earlier]]:
    """Yields each stage with its configuration and the stages before it. What stages name on the hub is fetched
    (`config.hub`): the shapes of models, and their weights too if asked for."""
    earlier: dict[str, ModelConfig | None] = {}
    for stage in run.stages:
        config = located(stage_config(run, stage.name), stage.command, run.directory, weights)
        yield stage, config, dict(earlier)
        try:
            model = resolve_model(config.model, earlier)
            earlier[config.directory] = trained_model(model, config.train, config.train.steps)
        except ValueError:
            earlier[config.directory] = None  # this stage's own check says why
