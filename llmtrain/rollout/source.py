"""Samples rollouts in step with training: groups are made when a step asks for them, with the newest weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from llmtrain.data.prompts import PromptSet
from llmtrain.data.sampler import derive
from llmtrain.parallel.mesh import Mesh
from llmtrain.rollout.generator import Generator, Weights
from llmtrain.types import Group, Prompt, Reward, Sampling

Load = Callable[[Weights, int], None]
"""Takes what `Generator.load_weights` takes."""


class Order(Protocol):
    """Says which rows the prompts of a run are."""

    def choose(self, numbers: range) -> list[int]:
        """Returns the row of each of these prompts, the next ones of the run."""

    def note(self, rows: Sequence[int], groups: Sequence[Group]) -> None:
        """Hears what became of rows that were chosen, once their groups are rewarded."""


class Shuffled:
    """Takes each row once an epoch, in an order that follows from the seed."""

    def __init__(self, prompts: PromptSet, seed: int) -> None:
        self.prompts, self.seed = prompts, seed

    def choose(self, numbers: range) -> list[int]:
        """Returns the rows; see Order."""
        return [self.prompts.at(number, self.seed) for number in numbers]

    def note(self, rows: Sequence[int], groups: Sequence[Group]) -> None:
        """Changes nothing."""


class InStep:
    """Implements a `RolloutSource` without staleness: `take` samples with the weights that were published last."""

    def __init__(
        self,
        generator: Generator,
        prompts: PromptSet,
        prompts_per_step: int,
        sampling: Sampling,
        reward: Reward,
        seed: int,
        order: Order | None = None,
        load: Load | None = None,
    ) -> None:
        """`order` says which rows are taken; None = `Shuffled`. `load` loads weights into the generator, as its
        `load_weights` (None) does, and may do more."""
        self.order, self.load = order or Shuffled(prompts, seed), load or generator.load_weights
        self.generator, self.prompts, self.prompts_per_step = generator, prompts, prompts_per_step
        self.sampling, self.reward, self.seed, self.version = sampling, reward, seed, 0

    def take(self, step: int) -> list[Group]:
        """Samples and rewards the groups of a step; see RolloutSource.

        Which prompts these are follows from the seed, the step and the order; their random streams from the first two.
        """
        return self.ask(range(step * self.prompts_per_step, (step + 1) * self.prompts_per_step))

    def ask(self, numbers: range) -> list[Group]:
        """Samples and rewards the groups of these prompts; see RolloutSource."""
        rows = self.order.choose(numbers)
        groups = self.generator.generate(numbered(self.prompts, self.seed, numbers, rows), self.sampling)
        for group, row in zip(groups, rows, strict=True):
            for sample in group:
                assert set(sample.versions) <= {self.version}, f"sampled by {set(sample.versions)}, not {self.version}"
                sample.example = self.prompts.examples[row]
        self.reward(groups)
        self.order.note(rows, groups)
        return groups

    def publish(self, weights: Weights, version: int) -> None:
        """Loads the weights into the generator; see RolloutSource."""
        self.load(weights, version)
        self.version = version

    def close(self) -> None:
        """Ends the generator; see RolloutSource."""
        self.generator.close()

    def report(self) -> dict[str, float]:
        """Returns nothing; see RolloutSource."""
        return {}


def numbered(prompts: PromptSet, seed: int, numbers: Sequence[int], rows: Sequence[int]) -> list[Prompt]:
    """Returns the run's prompts with these numbers, which are these rows; their random streams follow from the seed."""
    streams = [derive(seed, f"rollout/{number}") for number in numbers]
    return [prompts.prompt(row, stream) for row, stream in zip(rows, streams, strict=True)]


def shared_reward(reward: Reward, mesh: Mesh) -> Reward:
    """Returns a reward whose work the trainers share: each scores its part of the groups (a collective)."""

    def share(groups: Sequence[Group]) -> None:
        mine = groups[mesh.rank :: mesh.size]
        reward(mine)
        parts = mesh.all_gather_json([[[s.reward, s.parts, s.errors] for s in group] for group in mine])
        for rank, part in enumerate(parts):
            for group, scored in zip(groups[rank :: mesh.size], part, strict=True):
                for sample, (total, by_name, errors) in zip(group, scored, strict=True):
                    sample.reward, sample.parts, sample.errors = total, by_name, errors

    return share
