"""Defines what a rule over several keys may look at, and for which commands and recipes a rule holds."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from llmtrain.arch.mesh import mesh_sizes
from llmtrain.arch.resolve import newest_step
from llmtrain.config.recipes import Recipe, recipe_of
from llmtrain.config.rows import there
from llmtrain.config.schema import Config, ModelConfig

Earlier = Mapping[str, ModelConfig | None]
"""Maps the directories of the stages before this one to their models, None where these are not known."""


@dataclass(frozen=True)
class Case:
    """Holds what a rule may look at. `model` is resolved, or None when its weights do not exist yet."""

    config: Config
    model: ModelConfig | None
    world_size: int
    command: str
    run_dir: str | None  # that of the whole run: what lies below it may be made by a stage before
    earlier: Earlier
    planned: bool = False  # nothing starts here: files, programs and packages may come later

    @property
    def recipe(self) -> Recipe | None:
        """Returns the algorithm of a command that trains, None for another."""
        return recipe_of(self.command, self.config)

    @property
    def trainers(self) -> int:
        """Returns the number of ranks that train."""
        rollout = self.config.rollout
        separate = self.recipe is not None and self.recipe.samples and rollout.placement == "separate"
        return self.world_size - (rollout.workers if separate else 0)

    @property
    def sizes(self) -> dict[str, int] | None:
        """Returns the ranks on each axis of the mesh; None if the ranks do not fit, which a rule of its own reports."""
        try:
            return mesh_sizes(self.config.parallel, self.trainers)
        except ValueError:
            return None

    @property
    def own_run(self) -> bool:
        """Says whether the command reads the weights of the document's own run, which has trained before."""
        return self.command in ("eval", "export") and newest_step(self.config.directory) > 0

    @property
    def makes_data(self) -> bool:
        """Says whether the stage itself makes the tokenizer and what lies in its data directory."""
        return self.recipe is not None and bool(self.config.data.sources or self.config.data.tasks)

    def missing(self, path: str) -> bool:
        """Tells whether there is nothing at `path`, and neither this stage nor one before could make it."""
        if self.planned:
            return False
        data_dir = self.config.data.path or os.path.join(self.config.directory, "data")
        made = self.run_dir is not None and inside(path, self.run_dir)
        made = made or (self.makes_data and inside(path, data_dir))
        return not made and not there(path)

    def missing_model(self, path: str) -> bool:
        """Tells whether there are no weights at `path` and none can come: they only lie in the directory of a stage."""
        there = self.planned or os.path.exists(path)
        return not there and not any(inside(path, stage) for stage in self.earlier)


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


def reads_rewards(case: Case) -> bool:
    """Holds for recipes that judge samples or rows by the section rewards."""
    return case.recipe is not None and case.recipe.reads_rewards


def command(*names: str) -> Where:
    """Returns a condition that holds for these commands."""
    return lambda case: case.command in names


def here(condition: Where) -> Where:
    """Returns a condition that holds where another does and the command runs on this machine: for what looks at its
    files, programs and packages."""
    return lambda case: not case.planned and condition(case)


def either(*conditions: Where) -> Where:
    """Returns a condition that holds where one of them does."""
    return lambda case: any(condition(case) for condition in conditions)


def inside(path: str, directory: str) -> bool:
    """Tells whether the path lies in the directory."""
    path, directory = os.path.abspath(path), os.path.abspath(directory)
    return os.path.commonpath([path, directory]) == directory


def evaluates_problems(case: Case) -> bool:
    """Holds for evaluations that sample answers to problems, among them those beside training."""
    beside = case.recipe is not None and case.config.eval.every_steps > 0 and case.config.data.held_out is not None
    return case.config.eval.problems > 0 and (case.command == "eval" or beside)
