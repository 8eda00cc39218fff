"""Adds up what the models of a run cost: samples and CPU-seconds of all stages that they were made from."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml


@dataclass
class Cost:
    """Holds the completions that were sampled, and the CPU-seconds of the processes (None: `llmtrain run` did not
    start them)."""

    samples: int = 0
    cpu_s: float | None = None


def total_cost(directory: str, known: Mapping[str, Cost], configs: Mapping[str, str]) -> Cost:
    """Returns the cost of all stages that the one at `directory` names in its document, and that these name in turn,
    without its own. Both mappings go by the real path of a stage's directory.

    A stage counts once, be it named as first weights, as data, as a teacher or as a reward model. Stages of other runs
    are not counted.
    """
    found: dict[str, None] = {}
    waiting = [directory]
    while waiting:
        for source in sources(configs.get(waiting.pop(), ""), known):
            if source != directory and source not in found:
                found[source] = None
                waiting.append(source)
    times = [known[source].cpu_s for source in found if known[source].cpu_s is not None]
    return Cost(sum(known[source].samples for source in found), sum(times) if times else None)


def sources(config: str, known: Mapping[str, Cost]) -> Iterator[str]:
    """Yields the directories of stages in which a path of this document lies, or which it is. A text that is no YAML
    names none."""
    try:
        paths = list(texts(yaml.safe_load(config)))
    except yaml.YAMLError:
        return
    for path in paths:
        place = os.path.realpath(path)
        while place not in known and place != os.path.dirname(place):
            place = os.path.dirname(place)
        if place in known:
            yield place


def texts(value: Any) -> Iterator[str]:
    """Yields all texts in a document that may be paths."""
    if isinstance(value, dict):
        for name, each in value.items():
            if name not in ("run_dir", "held_out", "function"):
                yield from texts(each)
    elif isinstance(value, list):
        for each in value:
            yield from texts(each)
    elif isinstance(value, str) and os.sep in value and "\0" not in value:
        yield value
