"""Describes PPO: its section, its rules, and what a run may not change when it goes on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from llmtrain.config.recipes.base import (
    SAMPLING_PLOTS,
    MismatchForm,
    Panel,
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
    whole_minibatches,
    without_effect,
)
from llmtrain.config.schema import Config
from llmtrain.config.section import Section, Share, UserPath


class PpoConfig(Section):
    """Configures PPO (arXiv 1707.06347) of a policy and a critic of its own. See docs/posttraining/ppo.md."""

    prompts_per_step: PositiveInt = 32  # prompts of a step; each is answered `rollout.group_size` times, 1 is enough
    epochs: PositiveInt = 1  # times that the samples of a step are gone through
    minibatches: PositiveInt = 2  # updates of policy and critic in each of these epochs
    clip_low: PositiveFloat = 0.2  # the ratio is clipped to 1 - clip_low ...
    clip_high: PositiveFloat = 0.2  # ... 1 + clip_high
    mismatch: MismatchForm = "auto"  # corrects a generator that is not the trainer; auto: truncate, off in fp32
    mismatch_cap: PositiveFloat = 2.0  # truncate, mask_seqs: p_trainer / p_generator counts at most this
    mismatch_low: PositiveFloat = 0.5  # mask: tokens, mask_seqs: sequences by their geometric mean, are left out below
    mismatch_high: PositiveFloat = 5.0  # ... mismatch_low, or above mismatch_high
    value_clip: PositiveFloat | None = 0.2  # most that a value gains from moving in a step; None = no limit
    gamma: float = Field(1.0, gt=0.0, le=1.0)  # discount a token
    critic_lambda: Share = 0.95  # of GAE for the returns that the critic learns; VAPO has 1
    policy_lambda: Share = 0.95  # of GAE for the advantages of the policy
    length_alpha: PositiveFloat | None = None  # policy_lambda = 1 - 1 / (this x tokens of the sample); VAPO has 0.05
    whiten: bool = True  # advantages of a step have mean 0 and deviation 1; returns are taken before
    critic_lr: PositiveFloat | None = None  # learning rate of the critic; None = optim.lr; the rest is as in `optim`
    critic_from: UserPath | None = None  # run or directory that the critic starts from; None = the policy's start
    critic_warmup_steps: int = Field(0, ge=0)  # first steps, in which only the critic is updated
    kl_coef: float = Field(0.0, ge=0.0)  # of the KL to the weights at the start; 0 = there is no reference
    kl_in: Literal["reward", "loss"] = "reward"  # reward: -kl_coef k1 at each token; loss: kl_coef k3
    kl_target: PositiveFloat | None = None  # nats a sample to which kl_coef is adapted; None = kl_coef stays
    kl_horizon: PositiveInt = 10_000  # samples in which kl_coef moves by a fifth at most; a step has no more
    wait_on_host: bool = False  # models wait in host memory while another one works


def step_size(config: Config) -> StepSize:
    """Returns how much a step samples."""
    p = config.ppo
    return sampled(config, p.prompts_per_step, p.epochs * p.minibatches)


def passes(config: Config) -> Passes:
    """Returns how often the samples of a step are gone through, by the policy and by the critic."""
    p = config.ppo
    own_start = p.kl_coef > 0 and config.model.lora is not None
    old = old_scores(mismatch_of(config, "ppo"), p.epochs, p.minibatches)
    return Passes(rows_of(config, p.prompts_per_step), p.epochs, p.minibatches, old + own_start, critics=1.0)


def other_models(config: Config) -> tuple[str, ...]:
    """Returns the models that a job holds beside the policy."""
    return ("a trained critic", *frozen_reference(config, config.ppo.kl_coef > 0))


def critic_weights(config: Config) -> dict[str, str]:
    """Returns the key and the directory that the critic starts from, if there is one of its own."""
    path = config.ppo.critic_from
    return {} if path is None else {"ppo.critic_from": path}


def policy_learns(config: Config) -> Iterator[str]:
    """Yields a line if the run ends before the policy is updated."""
    warmup, steps = config.ppo.critic_warmup_steps, config.train.steps
    if warmup >= steps:
        yield (
            f"ppo.critic_warmup_steps={warmup}: must be less than train.steps={steps}, or the policy is never updated; "
            "lower it or raise train.steps"
        )


def kl_is_there(config: Config) -> Iterator[str]:
    """Yields a line for each key of a KL that is not computed."""
    if config.ppo.kl_coef == 0:
        why, remedy = "there is no KL with ppo.kl_coef=0", "set kl_coef, such as 0.01"
        yield from without_effect(config, "ppo", ("kl_in",), why, remedy)
    if config.ppo.kl_target is not None and config.ppo.kl_coef == 0:
        yield (
            f"ppo.kl_target={config.ppo.kl_target:g}: needs a first ppo.kl_coef above 0, which it multiplies; set it, "
            "such as 0.1, or remove kl_target"
        )


def slow_enough(config: Config) -> Iterator[str]:
    """Yields a line if a step could move the coefficient of the KL by more than a fifth, or below 0."""
    p, samples = config.ppo, config.ppo.prompts_per_step * config.rollout.group_size
    if p.kl_target is not None and p.kl_horizon < samples:
        yield (
            f"ppo.kl_horizon={p.kl_horizon}: must be at least the samples of a step (prompts_per_step x group_size = "
            f"{samples}), or the coefficient could jump or turn negative; raise it"
        )


def one_lambda(config: Config) -> Iterator[str]:
    """Yields a line if two keys give the policy's lambda."""
    default = PpoConfig().policy_lambda  # a resolved document has every key written out
    if config.ppo.length_alpha is not None and config.ppo.policy_lambda != default:
        yield (
            f"ppo.policy_lambda={config.ppo.policy_lambda:g}: ppo.length_alpha={config.ppo.length_alpha:g} gives the "
            "lambda of each sample; remove one of the two"
        )


PLOTS: dict[str, tuple[Panel, ...]] = {
    **SAMPLING_PLOTS,
    "critic": (
        ("Loss of the critic", {"critic_loss": "clipped"}),
        ("Mean a token", {"value_mean": "value", "return_mean": "return"}),
        ("Variance of the returns that the critic explains", {"explained_variance": "share"}),
        ("KL to the reference, nats a sample", {"kl_sample": "KL"}),
    ),
}
"""Holds the plots of the policy and of its critic."""

MAY_CHANGE = ("critic_lr", "critic_from", "wait_on_host")  # when a run goes on; of critic_from the contents must stay

RECIPE = Recipe(
    name="ppo",
    summary="reinforcement learning with a critic (starts under torchrun too)",
    main="llmtrain.recipes.ppo:main",
    section=PpoConfig,
    rules=(
        whole_minibatches("ppo"),
        policy_learns,
        kl_is_there,
        slow_enough,
        one_lambda,
        mismatch_bounds("ppo"),
        no_spikes("ppo", "is near 0 whatever happens"),
    ),
    step_size=step_size,
    passes=passes,
    other_models=other_models,
    same=tuple(f"ppo.{key}" for key in PpoConfig.model_fields if key not in MAY_CHANGE),
    starts_trained=True,
    weights=critic_weights,
    values=("ppo.critic_from",),
    samples=True,
    branches=True,
    plots=PLOTS,
)
