"""Describes reward modelling: its section, its rules, and what a run may not change when it goes on."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from llmtrain.config.recipes.base import PAIR_PLOTS, Recipe, paired
from llmtrain.config.schema import Config, Section


class RewardModelConfig(Section):
    """Configures a reward model on preference pairs (Bradley-Terry, arXiv 2203.02155); see docs/posttraining/reward.md.
    It needs `model.head: scalar`."""

    center_coef: float = Field(0.01, ge=0.0)  # of (r_chosen + r_rejected)^2, which keeps rewards around 0; 0 = none


def no_replay(config: Config) -> Iterator[str]:
    """Yields a line if text is mixed in."""
    if config.data.replay_seqs:
        yield f"data.replay_seqs={config.data.replay_seqs}: must be 0 in reward, whose head predicts no text; remove it"


RECIPE = Recipe(
    name="reward",
    summary="train a reward model on preference pairs (starts under torchrun too)",
    main="llmtrain.recipes.reward:main",
    section=RewardModelConfig,
    rules=(no_replay,),
    step_size=paired,
    same=("reward.center_coef",),
    starts_trained=True,
    head="scalar",
    branches=True,
    plots=PAIR_PLOTS,
)
