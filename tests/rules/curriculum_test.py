"""What is refused of data.curriculum."""

from __future__ import annotations

import pytest

from llmtrain.config.curriculum import CurriculumConfig


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({}, "neither orders rows"),
        ({"min_pass_rate": 0.9, "max_pass_rate": 0.1}, "min_pass_rate=0.9: must be at most max_pass_rate=0.1"),
        ({"max_pass_rate": 0.9, "start": 0.5}, "start=0.5: needs column"),
        ({"max_pass_rate": 0.9, "easy": "high"}, "easy=high: needs column"),
    ],
)
def test_settings_that_contradict_themselves(settings: dict, fault: str) -> None:
    (line,) = CurriculumConfig(**settings).faults()
    assert fault in line


@pytest.mark.parametrize(
    "settings", [{"column": "level"}, {"max_pass_rate": 0.9}, {"min_pass_rate": 0.5, "column": "x"}]
)
def test_settings_that_go_together(settings: dict) -> None:
    assert list(CurriculumConfig(**settings).faults()) == []


@pytest.mark.parametrize("settings", [{"start": 0.0}, {"full_at": 1.5}, {"skip_epochs": 0}, {"easy": "hard"}])
def test_values_out_of_range(settings: dict) -> None:
    with pytest.raises(ValueError):
        CurriculumConfig(column="level", **settings)
