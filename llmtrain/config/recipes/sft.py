"""Describes supervised fine-tuning: its section, which chooses among the rows, and its rules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import Field, PositiveInt

from llmtrain.config.recipes.base import Recipe
from llmtrain.config.schema import Config, Section


class SftConfig(Section):
    """Chooses which rows of `data.train` are trained, as the distillation of reasoning traces does; by default all are.
    The answer of a row is what is trained of it, its thinking included. See docs/posttraining/sft.md."""

    min_trace_tokens: int = Field(0, ge=0)  # rows with a shorter answer are left out
    max_trace_tokens: PositiveInt | None = None  # rows with a longer answer are left out; None = no bound
    require_think: bool = False  # leaves out answers that do not think, end it by </think>, and then say something
    min_reward: float | None = None  # answers to which `rewards` give less are left out; 1.0 = only right ones are kept

    @property
    def chooses(self) -> bool:
        """Says whether rows may be left out."""
        return self != SftConfig()


def variant(config: Config) -> Mapping[str, Any]:
    """Returns what is different about a run whose rows are judged."""
    return {} if config.sft.min_reward is None else {"judges_rows": True}


def bounds_in_order(config: Config) -> Iterator[str]:
    """Yields a line if no answer can have the wanted length."""
    s = config.sft
    if s.max_trace_tokens is not None and s.min_trace_tokens > s.max_trace_tokens:
        yield (
            f"sft.min_trace_tokens={s.min_trace_tokens}: must be at most "
            f"sft.max_trace_tokens={s.max_trace_tokens}; lower it"
        )


def rewards_are_named(config: Config) -> Iterator[str]:
    """Yields a line if rows are to be judged and the document does not say by what."""
    if config.sft.min_reward is not None and "rewards" not in config.model_fields_set:
        yield (
            f"sft.min_reward={config.sft.min_reward:g}: needs `rewards`, by which the answers are judged; add them, "
            "such as rewards: {name: math}"
        )


RECIPE = Recipe(
    name="sft",
    summary="train on the answers of demonstrations (starts under torchrun too)",
    main="llmtrain.recipes.sft:main",
    section=SftConfig,
    rules=(bounds_in_order, rewards_are_named),
    same=tuple(f"sft.{key}" for key in SftConfig.model_fields),
    variant=variant,
)
