"""Describes GRPO: its section, its rules, and what a run may not change when it goes on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import Field, PositiveFloat, PositiveInt

from llmtrain.config.recipes.base import SAMPLING_PLOTS, Recipe, StepSize, frozen_reference, sampled
from llmtrain.config.schema import Config, Section


class GrpoConfig(Section):
    """Configures GRPO (arXiv 2402.03300). `grpo.reward: NAME` of earlier versions is read as `rewards: [{name:
    NAME}]`."""

    prompts_per_step: PositiveInt = 32  # groups sampled a step
    minibatches: PositiveInt = 1  # updates on one set of rollouts
    clip_low: PositiveFloat = 0.2  # the ratio is clipped to 1 - clip_low ...
    clip_high: PositiveFloat = 0.2  # ... 1 + clip_high
    kl_coef: float = Field(0.0, ge=0.0)  # against the weights at the start
    normalize_std: bool = True  # advantage = (r - mean) / std of its group; False = Dr. GRPO


def step_size(config: Config) -> StepSize:
    """Returns how much a step samples."""
    return sampled(config, config.grpo.prompts_per_step, config.grpo.minibatches)


def other_models(config: Config) -> tuple[str, ...]:
    """Returns the models that a job holds beside the policy."""
    return frozen_reference(config, config.grpo.kl_coef > 0)


def whole_minibatches(config: Config) -> Iterator[str]:
    """Yields a line if the prompts of a step do not divide into minibatches."""
    g = config.grpo
    if g.prompts_per_step % g.minibatches:
        yield (
            f"grpo.prompts_per_step={g.prompts_per_step}: must be a multiple of grpo.minibatches={g.minibatches}; "
            "change one of them"
        )


def groups_compare(config: Config) -> Iterator[str]:
    """Yields a line if a group is too small for an advantage."""
    if config.rollout.group_size < 2:
        yield (
            f"rollout.group_size={config.rollout.group_size}: must be at least 2, an advantage compares samples; "
            "raise it"
        )


def no_spikes(config: Config) -> Iterator[str]:
    """Yields a line if the loss is watched for spikes."""
    if config.guard.spike != "off":
        yield f"guard.spike={config.guard.spike}: must be off in grpo, whose loss is near 0 whatever happens; remove it"


def reward_as_list(name: Any) -> tuple[str, Any]:
    """Returns what `grpo.reward` of earlier versions is called now."""
    return "rewards", [{"name": name}]


RECIPE = Recipe(
    name="grpo",
    summary="reinforcement learning with verifiable rewards (starts under torchrun too)",
    main="llmtrain.recipes.grpo:main",
    section=GrpoConfig,
    rules=(whole_minibatches, groups_compare, no_spikes),
    step_size=step_size,
    other_models=other_models,
    same=(
        "grpo.prompts_per_step",
        "grpo.minibatches",
        "grpo.normalize_std",
        "grpo.kl_coef",
        "grpo.clip_low",
        "grpo.clip_high",
    ),
    starts_trained=True,
    samples=True,
    branches=True,
    plots=SAMPLING_PLOTS,
    moved={"reward": reward_as_list},
)
