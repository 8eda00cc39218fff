"""Describes what runs one after the other: a phase is a datatrove pipeline that is cut into tasks."""

from __future__ import annotations

from dataclasses import dataclass

from datatrove.pipeline.base import PipelineStep


@dataclass(frozen=True)
class Phase:
    """Names a pipeline. Each of its `tasks` runs all steps on its part of the input, and is done once."""

    name: str  # of its folder of logs, counts and marks of finished tasks
    steps: list[PipelineStep]
    tasks: int
