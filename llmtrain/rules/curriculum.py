"""Checks data.curriculum. Each rule yields lines with value, rule and remedy."""

from __future__ import annotations

from collections.abc import Iterator

from llmtrain.config.recipes import names_of
from llmtrain.rules.case import Case, Rules, plans, samples


def _curriculum(case: Case) -> Iterator[str]:
    settings = case.config.data.curriculum
    if settings is None:
        return
    yield from settings.faults()
    if case.recipe is not None and not case.recipe.samples:
        have = names_of(lambda recipe: recipe.samples)
        yield f"data.curriculum: is for recipes that sample ({have}); remove it from {case.command}"
    environment, agent = case.config.rollout.environment, case.config.rollout.agent
    parts = agent is not None or (environment is not None and (environment.game or environment.function))
    if samples(case) and settings.filters and not case.config.rewards and not parts:
        yield (
            "data.curriculum: min_pass_rate and max_pass_rate read rewards, and rewards=[], so no row would ever count "
            "as solved; add one, such as {name: math}, or remove both"
        )


CURRICULUM_RULES: Rules = ((plans, _curriculum),)
