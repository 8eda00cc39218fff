"""What a rule over several keys may look at, and the arithmetic of the mesh."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from llmtrain.arch.mesh import mesh_sizes
from llmtrain.config.recipes import Recipe, recipe_of
from llmtrain.config.schema import Config, ModelConfig

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
    def recipe(self) -> Recipe | None:
        """The algorithm, of a command that trains."""
        return recipe_of(self.command)

    @property
    def trainers(self) -> int:
        """Ranks that train."""
        rollout = self.config.rollout
        separate = self.recipe is not None and self.recipe.samples and rollout.placement == "separate"
        return self.world_size - (rollout.workers if separate else 0)

    @property
    def sizes(self) -> dict[str, int] | None:
        """Ranks on each axis of the mesh; None if the ranks do not fit, which a rule of its own reports."""
        try:
            return mesh_sizes(self.config.parallel, self.trainers)
        except ValueError:
            return None

    @property
    def makes_data(self) -> bool:
        """Says whether the stage itself makes the tokenizer and what lies in its data directory."""
        return self.recipe is not None and bool(self.config.data.sources or self.config.data.tasks)

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

Where = Callable[[Case], bool]
"""Says whether a rule holds for a case."""

Rules = tuple[tuple[Where, Rule], ...]


def trains(case: Case) -> bool:
    """Holds for every recipe."""
    return case.recipe is not None


def plans(case: Case) -> bool:
    """Holds for every recipe, and for `llmtrain plan` of a document that names none."""
    return case.recipe is not None or case.command == "plan"


def pretrains(case: Case) -> bool:
    """Holds for recipes that train on packed text."""
    return case.recipe is not None and case.recipe.packs_text


def tunes(case: Case) -> bool:
    """Holds for recipes that train on the examples of a file."""
    return case.recipe is not None and not case.recipe.packs_text


def samples(case: Case) -> bool:
    """Holds for recipes that sample from the policy."""
    return case.recipe is not None and case.recipe.samples


def command(*names: str) -> Where:
    """Returns a condition that holds for these commands."""
    return lambda case: case.command in names


def either(*conditions: Where) -> Where:
    """Returns a condition that holds where one of them does."""
    return lambda case: any(condition(case) for condition in conditions)


def inside(path: str, directory: str) -> bool:
    """Does the path lie in the directory?"""
    path, directory = os.path.abspath(path), os.path.abspath(directory)
    return os.path.commonpath([path, directory]) == directory
