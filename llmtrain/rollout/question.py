"""Holds prompts that are asked beside those of the steps, such as the problems of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from llmtrain.rollout.shared_weights import Shared
from llmtrain.types import Group, Prompt, Sampling


@dataclass(eq=False)
class Question:
    """Holds prompts that weights of one version answer, whatever is published meanwhile, and who has begun which.

    Example: q = Question(prompts, sampling, weights, at_once=8); q.begin(q.open[:8], worker=0); q.finish(groups)
    """

    prompts: Sequence[Prompt]
    sampling: Sampling
    weights: Shared
    at_once: int  # prompts that one worker is given at most
    open: list[int] = field(init=False)  # places of those that nobody has begun, or that were given back
    under_way: dict[int, int] = field(default_factory=dict)  # place -> worker
    done: dict[int, Group] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.open = list(range(len(self.prompts)))

    @property
    def answered(self) -> bool:
        """Returns whether all prompts are."""
        return len(self.done) == len(self.prompts)

    def begin(self, places: Sequence[int], worker: int) -> None:
        """Notes that a worker has begun these."""
        self.open = [place for place in self.open if place not in places]
        self.under_way |= dict.fromkeys(places, worker)

    def finish(self, groups: Mapping[int, Group]) -> None:
        """Takes what a worker made of its places."""
        for place in groups:
            del self.under_way[place]
        self.done |= groups

    def give_back(self, worker: int) -> int:
        """Opens what a worker had begun again; returns how many prompts that are."""
        lost = [place for place, who in self.under_way.items() if who == worker]
        self.under_way = {place: who for place, who in self.under_way.items() if who != worker}
        self.open = sorted([*self.open, *lost])
        return len(lost)
