"""Describes GRPO: its section, its rules, and what a run may not change when it goes on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from llmtrain.config.recipes.base import (
    SAMPLING_PLOTS,
    MismatchForm,
    Passes,
    Recipe,
    StepSize,
    frozen_reference,
    mismatch_bounds,
    mismatch_of,
    no_spikes,
    old_scores,
    rows_of,
    sampled,
    waiting_reference,
    whole_minibatches,
    without_effect,
)
from llmtrain.config.schema import Config, Section

OF_OBJECTIVE: dict[str, dict[str, Any]] = {"gspo": {"clip_low": 3e-4, "clip_high": 4e-4, "aggregate": "sequences"}}
"""Maps an objective to the defaults of its paper, where they are not those of `clip`."""


class GrpoConfig(Section):
    """Configures GRPO (arXiv 2402.03300) and what has grown from it; see docs/posttraining/grpo.md. `grpo.reward: NAME`
    of earlier versions is read as `rewards: [{name: NAME}]`."""

    prompts_per_step: PositiveInt = 32  # groups that a step trains on
    minibatches: PositiveInt = 1  # updates that share one set of rollouts
    epochs: PositiveInt = 1  # times that a set of rollouts is gone through; each makes `minibatches` updates
    dynamic_rounds: PositiveInt = 1  # rounds of sampling a step at most, until prompts_per_step groups have a spread
    overlong_buffer: int = Field(0, ge=0)  # last tokens of max_new_tokens in which the reward falls to -1; 0 = none
    baseline: Literal["mean", "leave_one_out"] = "mean"  # of the group, or of the other samples (RLOO)
    normalize_std: bool = True  # advantage = (r - baseline) / std; False = Dr. GRPO, RLOO
    std_of: Literal["group", "batch"] = "group"  # whose rewards' standard deviation (n - 1)
    std_eps: float = Field(1e-6, ge=0.0)  # is added to it; groups without a spread have no advantage anyway
    aggregate: Literal["tokens", "sequences", "constant"] = "tokens"  # a mean; gspo: by default sequences
    objective: Literal["clip", "gspo", "cispo"] = "clip"  # ratio of a token, of a sequence; cispo: a weight of log p
    clip_low: PositiveFloat = 0.2  # the ratio is clipped to 1 - clip_low ...; gspo: by default 3e-4
    clip_high: PositiveFloat = 0.2  # ... 1 + clip_high; gspo: by default 4e-4
    dual_clip: float | None = Field(None, gt=1.0)  # where A < 0, ratios count at most this (usual: 3); clip only
    ratio_cap: PositiveFloat = 5.0  # cispo: largest ratio, itself a ratio
    kl_coef: float = Field(0.0, ge=0.0)  # against the weights at the start
    reference_waits: bool = False  # those weights lie in host memory but while they score
    kl_form: Literal["k1", "k2", "k3"] = "k3"  # how the KL is estimated from a token
    kl_in: Literal["loss", "reward"] = "loss"  # a term of the loss; or taken from each reward, summed over its tokens
    mismatch: MismatchForm = "auto"  # corrects a generator that is not the trainer; auto: truncate, off in fp32
    mismatch_cap: PositiveFloat = 2.0  # truncate, mask_seqs: p_trainer / p_generator counts at most this
    mismatch_low: PositiveFloat = 0.5  # mask: tokens, mask_seqs: sequences by their geometric mean, are left out below
    mismatch_high: PositiveFloat = 5.0  # ... mismatch_low, or above mismatch_high
    off_policy_delta: PositiveFloat | None = None  # nats a token; worse sequences further off the policy are left out

    @model_validator(mode="after")
    def _of_objective(self) -> GrpoConfig:
        """Fills in the defaults of the objective, so that the written configuration holds the values in use; they do
        not count as set, and a stage may choose another objective."""
        unset = OF_OBJECTIVE.get(self.objective, {}).keys() - self.model_fields_set
        self.__dict__.update({key: OF_OBJECTIVE[self.objective][key] for key in unset})
        return self


def updates_per_step(config: Config) -> int:
    """Returns how many optimizer steps are made on one set of rollouts."""
    return config.grpo.epochs * config.grpo.minibatches


def step_size(config: Config) -> StepSize:
    """Returns how much a step samples."""
    g = config.grpo
    return sampled(config, g.prompts_per_step, updates_per_step(config), g.dynamic_rounds)


def passes(config: Config) -> Passes:
    """Returns how often the samples of a step are gone through; those of further rounds are not trained."""
    g = config.grpo
    own_start = g.kl_coef > 0 and config.model.lora is not None
    old = old_scores(mismatch_of(config, "grpo"), g.epochs, g.minibatches)
    return Passes(rows_of(config, g.prompts_per_step), g.epochs, g.minibatches, old + own_start)


def other_models(config: Config) -> tuple[str, ...]:
    """Returns the models that a job holds beside the policy."""
    return frozen_reference(config, config.grpo.kl_coef > 0)


def groups_compare(config: Config) -> Iterator[str]:
    """Yields a line if a group is too small for an advantage."""
    if config.rollout.group_size < 2:
        yield (
            f"rollout.group_size={config.rollout.group_size}: must be at least 2, an advantage compares samples; "
            "raise it"
        )


def room_to_punish(config: Config) -> Iterator[str]:
    """Yields a line if the penalty would begin before the first token."""
    buffer, limit = config.grpo.overlong_buffer, config.rollout.max_new_tokens
    if buffer > limit:
        yield f"grpo.overlong_buffer={buffer}: must be at most rollout.max_new_tokens={limit}; lower it"
    for key in ("environment", "agent"):
        if buffer and getattr(config.rollout, key) is not None:
            yield (
                f"grpo.overlong_buffer={buffer}: measures one completion, and rollout.{key} makes episodes of several "
                "turns; set it to 0"
            )


def used_together(config: Config) -> Iterator[str]:
    """Yields a line for each key that another one leaves without effect."""
    g = config.grpo
    if g.dual_clip is not None and g.objective != "clip":
        yield f"grpo.dual_clip={g.dual_clip:g}: is of grpo.objective=clip, not {g.objective}; remove it"
    if g.std_of == "batch" and not g.normalize_std:
        yield "grpo.std_of=batch: nothing is divided by it with grpo.normalize_std=false; remove one of them"
    if g.objective == "cispo":
        why, remedy = "grpo.objective=cispo has no clipping but ratio_cap", "set grpo.objective=clip"
        yield from without_effect(config, "grpo", ("clip_low", "clip_high"), why, remedy)
    else:
        why, remedy = f"is of grpo.objective=cispo, not {g.objective}", "set grpo.objective=cispo"
        yield from without_effect(config, "grpo", ("ratio_cap",), why, remedy)
    if g.kl_coef == 0:
        why, remedy = "there is no KL with grpo.kl_coef=0", "set kl_coef, such as 0.01"
        yield from without_effect(config, "grpo", ("kl_in", "kl_form"), why, remedy)


def reward_as_list(name: Any) -> tuple[str, Any]:
    """Returns what `grpo.reward` of earlier versions is called now."""
    return "rewards", [{"name": name}]


RECIPE = Recipe(
    name="grpo",
    summary="reinforcement learning with verifiable rewards (starts under torchrun too)",
    main="llmtrain.recipes.grpo:main",
    section=GrpoConfig,
    rules=(
        whole_minibatches("grpo"),
        groups_compare,
        room_to_punish,
        used_together,
        waiting_reference("grpo", lambda config: config.grpo.kl_coef > 0),
        mismatch_bounds("grpo"),
        no_spikes("grpo", "is near 0 whatever happens"),
    ),
    step_size=step_size,
    passes=passes,
    other_models=other_models,
    same=tuple(f"grpo.{key}" for key in GrpoConfig.model_fields if key != "reference_waits"),
    starts_trained=True,
    samples=True,
    branches=True,
    plots=SAMPLING_PLOTS,
    moved={"reward": reward_as_list},
)
