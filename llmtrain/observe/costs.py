"""Adds up what the models of a run cost: samples and CPU-seconds of all stages that they were made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass
class Cost:
    """Holds what one stage took: the completions that were sampled, the CPU-seconds of its processes, and from which
    stages of the run it was made."""

    samples: int = 0
    cpu_s: float = 0.0
    made_from: Sequence[str] = ()


def total_cost(stage: str, known: Mapping[str, Cost]) -> tuple[int, float] | None:
    """Returns the samples and CPU-seconds of all stages that a stage was made from, and that these were made from in
    turn, without its own; None where one of them is not known.

    A stage counts once, be it read for first weights, data, a teacher or a reward model. Stages of other runs are not
    counted.
    """
    found: dict[str, None] = {}
    waiting = [stage]
    while waiting:
        for source in known[waiting.pop()].made_from:
            if source not in known:
                return None
            if source != stage and source not in found:
                found[source] = None
                waiting.append(source)
    return sum(known[source].samples for source in found), sum(known[source].cpu_s for source in found)
