"""Defines the keys of where cleaning runs."""

from __future__ import annotations

from typing import Any

from pydantic import Field, PositiveInt

from llmtrain.config.section import Section


class ExecutionConfig(Section):
    """Says how many tasks a phase of cleaning is cut into, and what runs them."""

    tasks: PositiveInt = 1  # parts that an input is cut into, at most one a file; a part that is done is never redone
    workers: PositiveInt = 1  # tasks at a time
    retries: int = Field(2, ge=0)  # times that a task is started again after its process died or failed
    slurm: dict[str, Any] = Field({})  # partition, time and further arguments of datatrove's Slurm executor
    ray_address: str | None = None  # of a running Ray cluster; None = one on this machine, started for the job
