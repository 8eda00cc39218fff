"""Samples rollouts ahead of training: processes beside the trainers answer the prompts of coming steps while these
train."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import chain

import torch

from llmtrain.data.prompts import PromptSet
from llmtrain.parallel.mesh import Mesh
from llmtrain.rollout.board import Board, Limits, WorkersFail
from llmtrain.rollout.fleet import Fleet, Orders
from llmtrain.rollout.generator import Weights
from llmtrain.rollout.question import Question
from llmtrain.rollout.shared_weights import share
from llmtrain.rollout.wire import pack, unpack
from llmtrain.types import Group, Prompt, Reward, Sampling

ROOT = 0  # the trainer that keeps the workers


class Pinned:
    """Answers prompts as `Generator.generate` does, by workers that have nothing to sample for a step, with the weights
    that were the newest when it was made."""

    def __init__(self, board: Board, most_samples: int) -> None:
        """`most_samples` bounds what a worker is given at once."""
        assert board.weights is not None
        self.board, self.weights, self.most_samples = board, board.weights, most_samples

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        """Returns the groups in the order of the prompts; for another thread than the trainer's. Raises as
        `Board.answers` does."""
        at_once = max(1, self.most_samples // sampling.num_samples)
        return self.board.answers(Question(prompts, sampling, self.weights, at_once))


class Ahead:
    """Implements a `RolloutSource` with bounded staleness: `take` waits for groups that were begun earlier.

    No token that a step trains on was written by weights of more than `limits.max_staleness` steps before. Only
    trainer 0 keeps workers; it hands the others what they answer.
    """

    def __init__(
        self,
        mesh: Mesh,
        prompts: PromptSet,
        limits: Limits,
        orders: Orders,
        reward: Reward,
        seed: int,
        dtype: torch.dtype,
        first: int,
        verify: bool = False,
    ) -> None:
        """`first` is the number of the first prompt that the run still wants; `dtype` that of the sampling model; with
        `verify` workers compare the checksums of all weights with what they hold."""
        self.verify = verify
        self.mesh, self.prompts, self.limits, self.reward = mesh, prompts, limits, reward
        self.seed, self.dtype, self.version = seed, dtype, 0
        self.board = Board(limits, first, set(range(len(orders.program.settings))))
        self.fleet = Fleet(self.board, orders) if mesh.rank == ROOT else None
        self.samples = orders.sampling.num_samples
        self.waited_s, self.waiting, self.ages = 0.0, 0, []

    def take(self, step: int) -> list[Group]:
        """Returns the groups of a step, rewarded; see RolloutSource."""
        size = self.limits.prompts_per_step
        return self.ask(range(step * size, (step + 1) * size))

    def ask(self, numbers: range) -> list[Group]:
        """Returns the groups of the next prompts, rewarded; see RolloutSource. Raises on every trainer WorkersFail when
        nobody is left who samples, FloatingPointError when the model has diverged."""
        groups = self._shared(numbers)
        for group, number in zip(groups, numbers, strict=True):
            for sample in group:
                age = self.version - min(sample.versions, default=self.version)  # a side that never spoke has none
                assert age <= self.limits.max_staleness, f"prompt {number} was sampled {age} steps ago"
                sample.example = self.prompts.examples[self.prompts.at(number, self.seed)]
        self.ages += [self.version - v for s in chain.from_iterable(groups) for v in s.versions]
        self.reward(groups)
        return groups

    def publish(self, weights: Weights, version: int) -> None:
        """Makes these weights the newest, for what is begun from now on; see RolloutSource."""
        self.version = version
        if self.fleet is not None:
            self.board.publish(share(weights, version, self.dtype, self.verify))
            return
        for _ in weights:  # a collective
            pass

    def pinned(self) -> Pinned:
        """Returns what answers other prompts with the newest weights of now, on the trainer that keeps the workers."""
        return Pinned(self.board, self.limits.at_once * self.samples)

    def close(self) -> None:
        """Ends the workers; see RolloutSource."""
        if self.fleet is not None:
            self.fleet.close()

    def report(self) -> dict[str, float]:
        """Returns what metrics.jsonl says of the step that ends: see docs/rollouts/ahead.md."""
        counts, _ = self.board.flush()
        ages, self.ages = self.ages or [0], []
        waited_s, self.waited_s = self.waited_s, 0.0
        begun = max(1, counts.begun * self.samples + counts.rejected)
        return {
            "staleness_mean": sum(ages) / len(ages),
            "staleness_max": max(ages),
            "queue_groups": self.waiting,
            "trainer_idle_s": waited_s,
            "workers_idle_s": counts.rest_s,
            "workers": len(self.board.live),
            "rejected_fraction": (counts.given_back * self.samples + counts.rejected) / begun,
            "load_bytes": counts.loaded_bytes,
            "load_s": counts.load_s,
        }

    def _awaited(self, numbers: range) -> list[Group]:
        """Waits for the groups, on the trainer that keeps the workers."""
        began, self.waiting = time.perf_counter(), len(self.board.done)
        groups = self.board.take(numbers)
        self.waited_s += time.perf_counter() - began
        return groups

    def _shared(self, numbers: range) -> list[Group]:
        """Returns what trainer 0 waits for, on every trainer (a collective); all raise what it raises."""
        groups, error = [], None
        if self.fleet is not None:
            try:
                groups = self._awaited(numbers)
            except Exception as failed:  # of any kind: the other trainers wait to hear of it
                error = [type(failed).__name__, str(failed)]
        if (told := self.mesh.all_gather_json(error)[ROOT]) is not None:
            kind, reason = told
            raise FloatingPointError(reason) if kind == "FloatingPointError" else WorkersFail(reason)
        if self.mesh.size == 1:
            return groups
        ids = {number: self.prompts.prompt_ids(self.prompts.at(number, self.seed)) for number in numbers}
        data = self.mesh.all_gather_bytes(pack(dict(zip(numbers, groups, strict=False)), ids))[ROOT]
        return list(unpack(data, ids).values())
