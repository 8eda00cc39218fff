"""Registers the recipes: those of the package, and those that plugins add."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

from pydantic import create_model

from llmtrain.config.recipes import distill, dpo, grpo, ppo, pretrain, raft, reward, sft
from llmtrain.config.recipes.base import SAMPLING_PLOTS, Panel, Recipe, StepSize, fixed_rows, sampled
from llmtrain.config.schema import Config, RunConfig, StageConfig

__all__ = [
    "JUDGES",
    "OTHER_STAGES",
    "RECIPES",
    "SAMPLING_PLOTS",
    "Panel",
    "Recipe",
    "StepSize",
    "config_class",
    "fixed_rows",
    "names_of",
    "planned_command",
    "planned_recipes",
    "recipe_of",
    "register",
    "run_config_class",
    "sampled",
    "stage_commands",
]

RECIPES: dict[str, Recipe] = {
    each.RECIPE.name: each.RECIPE for each in (pretrain, sft, reward, dpo, grpo, ppo, raft, distill)
}
JUDGES = ("judge", "constitutional")  # commands that sample from a model, in one process, and write rows
OTHER_STAGES = (("data", "tokenizer"), (*JUDGES, "eval", "export", "report", "index"))  # before and behind recipes
# commands that are no stages, or will be
COMMANDS = ("chat", "doctor", "ladder", "plan", "run", "scaling", "serve")


def register(recipe: Recipe) -> None:
    """Makes a recipe known, from a module that the document names under `plugins`.

    Raises ValueError when it cannot be a command and a section: a name that is taken or no word, keys without defaults,
    a `main` that is no place.
    """
    taken = {*stage_commands(), *COMMANDS, *RunConfig.model_fields, "include"} - RECIPES.keys()
    if recipe.name in taken or not re.fullmatch(r"[a-z][a-z0-9_]*", recipe.name) or hasattr(Config, recipe.name):
        raise ValueError(
            f"recipe {recipe.name!r}: the name of a section or command, or no name for one; choose another"
        )
    if RECIPES.get(recipe.name, recipe) != recipe:
        raise ValueError(f"recipe {recipe.name!r}: there is one with this name already; choose another")
    if recipe.section is not None and (
        needed := [n for n, f in recipe.section.model_fields.items() if f.is_required()]
    ):
        raise ValueError(f"recipe {recipe.name!r}: {needed[0]} has no default; every key of its section needs one")
    if not re.fullmatch(r"[\w.]+:\w+", recipe.main):
        raise ValueError(
            f"recipe {recipe.name!r}: main={recipe.main!r}: must have the form module:function; correct it"
        )
    RECIPES[recipe.name] = recipe


def recipe_of(command: str, config: Config | None = None) -> Recipe | None:
    """Returns the recipe behind a command, as the document makes it if there is one; None if it is not one that
    trains."""
    recipe = RECIPES.get(command)
    return recipe if recipe is None or config is None else recipe.of(config)


def planned_recipes(config: Config) -> list[Recipe]:
    """Returns the recipes that a document of one stage may be for, by what it writes.

    They are those with a section of their own; else those of its plugins; else none where it is for another command
    (`planned_command`); else the first that samples if there is a `rollout` section; else the first that there is. Of
    these only recipes for the model's head, if there are any.
    """
    if planned_command(config) is not None:
        return []
    written, recipes = config.model_fields_set, RECIPES.values()
    own = [r for r in recipes if r.section is not None and r.name in written]
    outside = [r for r in recipes if config.plugins and not r.main.startswith("llmtrain.")]
    sampling = [r for r in recipes if r.samples and "rollout" in written]
    found = own or outside or [*sampling, *recipes][:1]
    return [r.of(config) for r in found if r.head == config.model.head] or [r.of(config) for r in found]


def planned_command(config: Config) -> str | None:
    """Returns the command that a document of one stage is for where that trains no model, by what it writes: no section
    of a recipe, and `judge`, `constitutional`, `eval` with a model to start from, or `tokenizer` without a model. None:
    it trains one."""
    written = config.model_fields_set
    if config.plugins or written & RECIPES.keys():
        return None
    evaluates = "eval" in written and not config.eval.every_steps and config.model.init_from is not None
    found = {name: name in written for name in JUDGES} | {"eval": evaluates}
    found["tokenizer"] = "tokenizer" in written and "model" not in written
    return next((name for name, is_meant in found.items() if is_meant), None)


def names_of(holds: Callable[[Recipe], bool]) -> str:
    """Returns the names of the recipes for which a condition holds, for a message."""
    return " or ".join(name for name, recipe in RECIPES.items() if holds(recipe))


def stage_commands() -> tuple[str, ...]:
    """Returns the commands that a stage of a `run` document may have."""
    before, behind = OTHER_STAGES
    return (*before, *RECIPES, *behind)


def config_class() -> type[Config]:
    """Returns the class of a document of one stage: Config with the section of every known recipe."""
    return _with_sections(Config, tuple(RECIPES.values()))


def run_config_class() -> type[RunConfig]:
    """Returns the class of a `run` document: RunConfig with the section of every known recipe."""
    return _with_sections(RunConfig, tuple(RECIPES.values()))


@cache
def _with_sections(base: type[Config], recipes: tuple[Recipe, ...]) -> type[Any]:
    fields: dict[str, Any] = {r.name: (r.section, r.section()) for r in recipes if r.section is not None}
    if issubclass(base, RunConfig):
        stage = create_model(
            "StageConfig", __base__=StageConfig, __doc__=StageConfig.__doc__, command=(Literal[stage_commands()], ...)
        )
        fields["stages"] = (list[stage], [])
    return create_model(base.__name__, __base__=base, __doc__=base.__doc__, **fields)
