"""What a rule over several keys may look at, and the arithmetic of the mesh."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from llmtrain.config.schema import Config, ModelConfig

TRAIN = ("pretrain", "sft", "grpo")
TUNE = ("sft", "grpo")


Earlier = Mapping[str, ModelConfig | None]
"""Directories of the stages before this one, with their models where these are known."""


@dataclass(frozen=True)
class Case:
    """What a rule may look at. `model` is resolved, or None when its weights do not exist yet."""

    config: Config
    model: ModelConfig | None
    world_size: int
    command: str
    run_dir: str | None  # of the whole run: what lies below it may be made by a stage before
    earlier: Earlier

    @property
    def trainers(self) -> int:
        """Ranks that train."""
        rollout = self.config.rollout
        separate = self.command == "grpo" and rollout.placement == "separate"
        return self.world_size - (rollout.workers if separate else 0)

    @property
    def makes_data(self) -> bool:
        """Does the stage itself make the tokenizer and what lies in its data directory?"""
        return self.command in TRAIN and bool(self.config.data.sources or self.config.data.tasks)

    def missing(self, path: str) -> bool:
        """Is there nothing at `path`, and neither this stage nor one before could make it?"""
        data_dir = self.config.data.path or os.path.join(self.config.directory, "data")
        made = self.run_dir is not None and inside(path, self.run_dir)
        made = made or (self.makes_data and inside(path, data_dir))
        return not made and not glob.glob(path, recursive=True)

    def missing_model(self, path: str) -> bool:
        """The same for weights, which only lie in the directory of a stage."""
        return not os.path.exists(path) and not any(inside(path, stage) for stage in self.earlier)


Rule = Callable[[Case], Iterator[str]]
"""Yields a line, `key=value: rule; remedy`, for each violation."""

Rules = tuple[tuple[tuple[str, ...], Rule], ...]
"""(commands it holds for, rule)"""


def inside(path: str, directory: str) -> bool:
    """Does the path lie in the directory?"""
    path, directory = os.path.abspath(path), os.path.abspath(directory)
    return os.path.commonpath([path, directory]) == directory
