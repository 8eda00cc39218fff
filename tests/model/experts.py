"""Provides what the tests of families with experts share."""

from __future__ import annotations

import math

from transformers import PreTrainedConfig

from llmtrain.arch.resolve import active_parameter_count, parameter_count, resolve_model
from llmtrain.config.schema import ModelConfig


def in_a_loop(config: PreTrainedConfig) -> PreTrainedConfig:
    """Makes transformers compute experts one by one: its grouped products refuse some widths."""
    config._experts_implementation = "eager"
    return config


def in_billions(count: int, like: str, cut: bool = False) -> str:
    """Returns a count in billions with as many digits as `like` has, the rest rounded or cut."""
    digits = len(like.partition(".")[2])
    units = count / 10 ** (9 - digits)
    return f"{(math.floor(units) if cut else round(units)) / 10**digits:.{digits}f}"


def check_sizes(
    preset: str, exact: int, total: str, active: str, embedding: bool = True, cut: bool = False
) -> ModelConfig:
    """Checks that a model has `exact` parameters, and `total` and `active` ones as published, in units of 10^9.

    embedding: the active ones include it, of which a token looks up one row. cut: `active` is not rounded. Returns the
    resolved model.
    """
    model = resolve_model(ModelConfig(preset=preset))
    assert parameter_count(model) == exact
    assert in_billions(exact, total) == total
    left_out = 0 if embedding else model.vocab_size * model.hidden_size
    assert in_billions(active_parameter_count(model) - left_out, active, cut) == active
    return model
