"""Defines the keys of where cleaning runs."""

from __future__ import annotations

from typing import Any

from pydantic import Field, PositiveInt

from llmtrain.config.section import Section


class ExecutorConfig(Section):
    """Says how many tasks a step is cut into, and what runs them."""

    tasks: PositiveInt = (
        1  # parts that each step is cut into, at most the input's files; a finished part is never redone
    )
    workers: PositiveInt = 1  # tasks at a time
    slurm: dict[str, Any] = Field({})  # slurm: partition, time, mem_per_cpu_gb, ... of datatrove's executor
