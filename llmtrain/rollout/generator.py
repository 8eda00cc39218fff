"""Defines the contracts of rollouts: what samples completions, and where a recipe takes its groups from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from torch import Tensor

from llmtrain.types import Group, Prompt, Sampling

Weights = Iterable[tuple[str, Tensor]]
"""Yields canonical names and whole tensors, as an engine's `full_weights` does."""


class Generator(Protocol):
    """Samples from a model: tokens in, tokens out."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        """Returns a group of `num_samples` samples for each prompt, in the order of the prompts."""

    def load_weights(self, weights: Weights, version: int) -> None:
        """Replaces all weights; tokens that are sampled later carry `version`."""

    def checksums(self) -> list[dict[str, str]]:
        """Returns the checksums (`rollout.checksums`) of all weights as they are held, by the names of `load_weights`:
        one dict for each copy of the model that is sampled from."""

    def sleep(self) -> None:
        """Frees what is only needed to generate (the cache)."""

    def wake(self) -> None:
        """Undoes `sleep`."""

    def close(self) -> None:
        """Ends whatever waits for requests; nothing can be generated afterwards."""


class RolloutSource(Protocol):
    """Gives a recipe the rewarded groups of each step, whoever samples them and when."""

    def take(self, step: int) -> list[Group]:
        """Returns the groups of a step, the same on every trainer (a collective over the trainers)."""

    def ask(self, numbers: range) -> list[Group]:
        """Returns the groups of the run's prompts with these numbers, for a recipe that says itself how many a step
        takes; else as `take`."""

    def publish(self, weights: Weights, version: int) -> None:
        """Hands over the weights after `version` steps (a collective over the trainers)."""

    def close(self) -> None:
        """Ends the generator."""

    def report(self) -> dict[str, float]:
        """Returns what metrics.jsonl says of the step that ends, beside what the groups say."""
