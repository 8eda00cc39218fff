"""Shared by the tests of families with experts."""

from __future__ import annotations

import pytest
from transformers import PreTrainedConfig

from llmtrain.config.schema import ModelConfig
from llmtrain.config.shapes import active_parameter_count, parameter_count, resolve_model, train_flops_per_token


def in_a_loop(config: PreTrainedConfig) -> PreTrainedConfig:
    """The experts of transformers one by one: its grouped products refuse some widths."""
    config._experts_implementation = "eager"
    return config


def check_sizes(preset: str, total: int, active: str) -> None:
    """`active`, in units of 10^9, is rounded as published; the FLOPs of a token alone in its row are 6 for each active
    parameter that multiplies."""
    model = resolve_model(ModelConfig(preset=preset))
    assert parameter_count(model) == total
    digits = len(active.partition(".")[2])
    assert f"{active_parameter_count(model) / 1e9:.{digits}f}" == active
    multiplying = active_parameter_count(model) - model.vocab_size * model.hidden_size
    assert train_flops_per_token(model, 1) == pytest.approx(6 * multiplying, rel=1e-3)
