"""Registers the recipes: those of the package, and those that plugins add."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Literal

from pydantic import create_model

from llmtrain.config.recipes import grpo, pretrain, sft
from llmtrain.config.recipes.base import Panel, Recipe, StepSize, fixed_rows, sampled
from llmtrain.config.schema import Config, RunConfig, StageConfig

__all__ = [
    "OTHER_STAGES",
    "RECIPES",
    "Panel",
    "Recipe",
    "StepSize",
    "config_class",
    "fixed_rows",
    "names_of",
    "recipe_of",
    "register",
    "run_config_class",
    "sampled",
    "stage_commands",
]

RECIPES: dict[str, Recipe] = {each.RECIPE.name: each.RECIPE for each in (pretrain, sft, grpo)}
OTHER_STAGES = (("data", "tokenizer"), ("eval", "export", "report"))  # commands of a run before and behind the recipes


def register(recipe: Recipe) -> None:
    """Makes a recipe known, from a module that the document names under `plugins`.

    Raises ValueError when the name is taken by another recipe, a command or a section.
    """
    known = RECIPES.get(recipe.name)
    if known is None and (recipe.name in Config.model_fields or recipe.name in stage_commands()):
        raise ValueError(f"recipe {recipe.name}: the name of a section or command; choose another")
    if known is not None and known != recipe:
        raise ValueError(f"recipe {recipe.name}: there is one with this name already; choose another")
    RECIPES[recipe.name] = recipe


def recipe_of(command: str) -> Recipe | None:
    """Returns the recipe behind a command, None if it is not one that trains."""
    return RECIPES.get(command)


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
