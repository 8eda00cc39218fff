"""Adds what an environment rewards to the rewards of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

from llmtrain.config.agent import AgentConfig
from llmtrain.config.environment import EnvironmentConfig
from llmtrain.envs.episodes import FAILED
from llmtrain.rewards import Score, stop_if_failing
from llmtrain.types import Group, Sample

Judged = list[tuple[dict[str, float], dict[str, str]]]
"""Holds (parts, errors) of each sample, as its environment left them."""


@dataclass(frozen=True)
class Part:
    """Stands for a part beside the entries of the section `rewards`, with what is read of these."""

    name: str
    weight: float
    max_error_share: float
    section: str  # that says so
    function: str | None = None
    verifies: bool = True


def judged_by_environment(groups: Sequence[Group]) -> Judged:
    """Returns what the environments said of the samples, before rewards replace it."""
    return [(sample.parts, sample.errors) for sample in chain.from_iterable(groups)]


def add_parts(groups: Sequence[Group], judged: Judged, settings: EnvironmentConfig | AgentConfig | None) -> list[Part]:
    """Adds the parts to the rewards of the samples, by their weights, and the errors. Returns the parts as entries like
    those of the section `rewards`.

    `groups` are all that were sampled together. A sample that lacks a part which another has gets 0 for it; where the
    environment failed, each part has failed. Raises ValueError for a part with the name of a reward.
    """
    if settings is None:
        return []
    samples = list(chain.from_iterable(groups))
    names = sorted({name for parts, errors in judged for name in (*parts, *errors)} - {FAILED})
    taken = [name for name in names if name in samples[0].parts]
    if taken:
        raise ValueError(
            f"rollout.environment: rewards a part {taken[0]!r}, and one of rewards has that name; give the entry of "
            "rewards another `name`"
        )
    parts = [_part(name, settings.weights.get(name, 1.0), settings) for name in names]
    for sample, (own, errors) in zip(samples, judged, strict=True):
        _add(sample, parts, own, errors)
    return parts


def failures_of(settings: EnvironmentConfig | AgentConfig | None) -> list[Part]:
    """Returns the entry under which failures of the environment itself are counted."""
    return [] if settings is None else [_part(FAILED, 0.0, settings)]


def episode_scores(settings: EnvironmentConfig) -> Callable[[Sequence[Sample], Sequence[Score] | None], list[Score]]:
    """Returns what scores episodes: as a reward judged them, or (None) by the sum of what their environment rewards, by
    its weights. A score of an episode that failed is an error; RewardsFail is raised where too many did."""

    def score(sample: Sample, judged: Score | None) -> Score:
        if sample.errors:
            return Score(0.0, next(iter(sample.errors.values())))
        own = sum(settings.weights.get(name, 1.0) * part for name, part in sample.parts.items())
        return Score(own) if judged is None else judged

    def scores(samples: Sequence[Sample], judged: Sequence[Score] | None) -> list[Score]:
        names = sorted({FAILED, *chain.from_iterable(sample.errors for sample in samples)})
        stop_if_failing([_part(name, 0.0, settings) for name in names], [s.errors for s in samples])
        return [score(*each) for each in zip(samples, judged or [None] * len(samples), strict=True)]

    return scores


def _part(name: str, weight: float, settings: EnvironmentConfig | AgentConfig) -> Part:
    """Returns the entry of a part."""
    section = "rollout.agent" if isinstance(settings, AgentConfig) else "rollout.environment"
    return Part(name, weight, settings.max_error_share, section)


def _add(sample: Sample, parts: Sequence[Part], own: dict[str, float], errors: dict[str, str]) -> None:
    """Adds the parts of one sample, and its errors."""
    for part in parts:
        sample.parts[part.name] = own.get(part.name, 0.0)
        sample.reward += part.weight * sample.parts[part.name]
        if FAILED in errors or part.name in errors:
            sample.errors[part.name] = errors.get(part.name) or errors[FAILED]
    if FAILED in errors:
        sample.errors[FAILED] = errors[FAILED]
