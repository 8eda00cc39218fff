"""Describes RAFT and its variants: fine-tuning on the samples of its own that a reward has chosen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import PositiveFloat, PositiveInt

from llmtrain.config.recipes.base import (
    SAMPLING_PLOTS,
    Mismatch,
    MismatchForm,
    Passes,
    Recipe,
    StepSize,
    mismatch_bounds,
    mismatch_of,
    no_spikes,
    old_scores,
    rows_of,
    sampled,
)
from llmtrain.config.schema import Config, Section

REJECT = "reinforce-rej"
OF_RATIO = ("clip_low", "clip_high", "mismatch", "mismatch_cap", "mismatch_low", "mismatch_high")


class RaftConfig(Section):
    """Configures RAFT (arXiv 2304.06767), and RAFT++ and Reinforce-Rej (arXiv 2504.11343). A step is a round: sample,
    choose, fine-tune on the chosen. See docs/posttraining/raft.md."""

    variant: Literal["raft", "raft++", "reinforce-rej"] = "raft"  # SFT; a clipped ratio; of wrong samples too
    prompts_per_step: PositiveInt = 128  # groups sampled a round
    minibatches: PositiveInt = 8  # updates into which what was chosen in a round is divided
    epochs: PositiveInt = 1  # times that what was chosen is gone through; each makes `minibatches` updates
    keep: Literal["all", "best"] = "all"  # of a group: all right samples, or the one with the highest reward
    min_reward: float | None = 1.0  # a sample is right from this reward on; null: any may be the best of its group
    clip_low: PositiveFloat = 0.2  # raft++, reinforce-rej: the ratio is clipped to 1 - clip_low ...
    clip_high: PositiveFloat = 0.2  # ... 1 + clip_high
    mismatch: MismatchForm = "auto"  # with a ratio: for a generator unlike the trainer; auto: truncate, off in fp32
    mismatch_cap: PositiveFloat = 2.0  # truncate, mask_seqs: p_trainer / p_generator counts at most this
    mismatch_low: PositiveFloat = 0.5  # mask: tokens, mask_seqs: sequences by their geometric mean, are left out below
    mismatch_high: PositiveFloat = 5.0  # ... mismatch_low, or above mismatch_high


def updates_per_step(config: Config) -> int:
    """Returns how many optimizer steps a round has in the schedule of the learning rate."""
    return config.raft.epochs * config.raft.minibatches


def correction(config: Config) -> Mismatch:
    """Returns how a generator that is not the trainer is corrected for: SFT on what was chosen has no ratio."""
    found = mismatch_of(config, "raft")
    return found._replace(form="off") if config.raft.variant == "raft" else found


def step_size(config: Config) -> StepSize:
    """Returns how much a round samples."""
    return sampled(config, config.raft.prompts_per_step, updates_per_step(config))


def passes(config: Config) -> Passes:
    """Returns how often what a round chooses is gone through: at most all samples, or the best of each prompt."""
    r = config.raft
    seqs = r.prompts_per_step if r.keep == "best" else rows_of(config, r.prompts_per_step)
    return Passes(seqs, r.epochs, r.minibatches, old_scores(correction(config), r.epochs, r.minibatches))


def enough_samples(config: Config) -> Iterator[str]:
    """Yields a line if there are more minibatches than samples that can be chosen."""
    r, each = config.raft, 1 if config.raft.keep == "best" else config.rollout.group_size
    if r.minibatches > r.prompts_per_step * each:
        yield (
            f"raft.minibatches={r.minibatches}: must be at most the {r.prompts_per_step * each} samples that a round "
            "can keep (raft.prompts_per_step, times rollout.group_size with raft.keep=all); lower it"
        )


def there_is_a_choice(config: Config) -> Iterator[str]:
    """Yields a line for each setting with which nothing, or not what is asked for, would be chosen."""
    r, size = config.raft, config.rollout.group_size
    if r.min_reward is None and r.variant == REJECT:
        yield f"raft.min_reward=null: raft.variant={REJECT} tells right samples from wrong ones by it; set it"
    elif r.min_reward is None and r.keep == "all":
        yield "raft.min_reward=null: with raft.keep=all every sample would be kept; set it, or raft.keep=best"
    if r.variant == REJECT and r.keep == "best":
        yield f"raft.keep=best: raft.variant={REJECT} trains on all samples of a group; remove it"
    if size < 2 and (r.variant == REJECT or r.keep == "best"):
        yield (
            f"rollout.group_size={size}: must be at least 2 with raft.keep={r.keep}, raft.variant={r.variant}, which "
            "compare samples; raise it"
        )


def ratio_is_there(config: Config) -> Iterator[str]:
    """Yields a line for each key of a ratio that the loss does not have."""
    for key in OF_RATIO if config.raft.variant == "raft" else ():
        value, default = getattr(config.raft, key), RaftConfig.model_fields[key].default
        if value not in (default, "off"):
            yield f"raft.{key}={value}: raft.variant=raft has no ratio; remove it, or set raft.variant=raft++"


RECIPE = Recipe(
    name="raft",
    summary="fine-tune on own samples that a reward chose (starts under torchrun too)",
    main="llmtrain.recipes.raft:main",
    section=RaftConfig,
    rules=(
        enough_samples,
        there_is_a_choice,
        ratio_is_there,
        mismatch_bounds("raft"),
        no_spikes("raft", "follows from what was chosen"),
    ),
    step_size=step_size,
    passes=passes,
    same=tuple(f"raft.{key}" for key in RaftConfig.model_fields),
    starts_trained=True,
    samples=True,
    branches=True,
    plots=SAMPLING_PLOTS,
)
