"""Describes direct preference optimization: its section, its rules, and what a run may not change when it goes on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, PositiveFloat

from llmtrain.config.recipes.base import (
    PAIR_PLOTS,
    Passes,
    Recipe,
    frozen_reference,
    paired,
    waiting_reference,
)
from llmtrain.config.schema import Config, Section

BETA, SIMPO_BETA = 0.1, 2.5  # of the papers


class DpoConfig(Section):
    """Configures direct preference optimization (arXiv 2305.18290) and its forms; see docs/posttraining/dpo.md."""

    loss: Literal["sigmoid", "ipo", "hinge", "simpo"] = "sigmoid"  # of a pair; simpo has no reference
    beta: PositiveFloat | None = None  # factor from log-ratios to rewards; None = 0.1, simpo 2.5
    gamma: float = Field(1.375, ge=0.0)  # simpo: by how much the reward of the chosen answer is to be higher
    label_smoothing: float = Field(0.0, ge=0.0, lt=0.5)  # probability that the labels of the file are wrong
    length_normalized: bool = False  # divide the log-ratio of an answer by its tokens; simpo always does
    nll_coef: float = Field(0.0, ge=0.0)  # of the mean negative log-likelihood a token of the chosen answer
    reference: Literal["live", "precomputed"] = "live"  # precomputed: once, before training, kept in the run directory
    reference_waits: bool = False  # live: the reference lies in host memory but while it scores

    @property
    def uses_reference(self) -> bool:
        """Says whether rewards are relative to the weights at the start."""
        return self.loss != "simpo"

    @property
    def scale(self) -> float:
        """Returns beta, that of the paper where none is given."""
        return self.beta or (BETA if self.uses_reference else SIMPO_BETA)


def live_reference(config: Config) -> bool:
    """Says whether a reference scores while the policy is trained."""
    return config.dpo.uses_reference and config.dpo.reference == "live"


def passes(config: Config) -> Passes:
    """Returns how often the pairs of a step are scored before they are trained."""
    own_start = live_reference(config) and config.model.lora is not None
    return Passes(config.train.global_batch_seqs, policy=float(own_start))


def other_models(config: Config) -> tuple[str, ...]:
    """Returns the models that a job holds beside the policy while it trains."""
    return frozen_reference(config, live_reference(config))


def forms(config: Config) -> Iterator[str]:
    """Yields a line for each key that the chosen loss does not read."""
    d, default = config.dpo, DpoConfig()  # a resolved document has every key written out
    if d.loss != "simpo" and d.gamma != default.gamma:
        yield f"dpo.gamma={d.gamma:g}: is read with dpo.loss=simpo alone, not {d.loss}; remove it, or change the loss"
    if d.loss == "simpo" and d.reference != default.reference:
        yield f"dpo.reference={d.reference}: not with dpo.loss=simpo, which has no reference; remove it"


RECIPE = Recipe(
    name="dpo",
    summary="direct preference optimization, without a reward model (starts under torchrun too)",
    main="llmtrain.recipes.dpo:main",
    section=DpoConfig,
    rules=(forms, waiting_reference("dpo", live_reference)),
    step_size=paired,
    passes=passes,
    other_models=other_models,
    same=(
        "dpo.loss",
        "dpo.beta",
        "dpo.gamma",
        "dpo.label_smoothing",
        "dpo.length_normalized",
        "dpo.nll_coef",
    ),
    starts_trained=True,
    branches=True,
    plots=PAIR_PLOTS,
)
