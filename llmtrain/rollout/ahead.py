"""Samples rollouts ahead of training: processes beside the trainers answer the prompts of coming steps while these
train."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from itertools import chain

import torch

from llmtrain.data.prompts import PromptSet
from llmtrain.parallel.mesh import Mesh
from llmtrain.rollout.board import Board, Counts, Limits, share_of
from llmtrain.rollout.fleet import Fleet, Orders
from llmtrain.rollout.generator import Weights
from llmtrain.rollout.machines import Gathering, Said, gathered, heard, waited
from llmtrain.rollout.question import Question
from llmtrain.rollout.shared_weights import share
from llmtrain.types import Group, Prompt, Reward, Sampling

ANSWER_S = 86400  # how long a trainer waits to be asked something beside; the launcher ends it when rank 0 is gone


class Pinned:
    """Answers prompts as `Generator.generate` does, by workers that have nothing to sample for a step, with the weights
    that were the newest when it was made."""

    def __init__(self, board: Board, most_samples: int, ranks: Gathering) -> None:
        """`most_samples` bounds what a worker is given at once; `ranks` are the trainers that keep workers."""
        assert board.weights is not None
        self.board, self.weights, self.most_samples, self.ranks = board, board.weights, most_samples, ranks

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        """Returns the groups in the order of the prompts, on every trainer that keeps workers (a collective of them;
        all pass the same prompts); for another thread than the trainer's. Raises on all FloatingPointError when the
        model has diverged, WorkersFail for whatever else ends it on one of them."""
        found, said = waited(self.board, dict)
        owed = list(range(len(prompts))) if self.ranks.rank == 0 else []  # to begin with, the first owes all
        while True:
            owners, left = heard(self.ranks.all_gather_json({**said, "owed": owed}))
            if not left:
                return gathered(self.ranks, found, {place: prompt.ids for place, prompt in enumerate(prompts)})
            mine = share_of(left, owners, self.ranks.rank)
            part, said = waited(self.board, partial(self._answers, mine, prompts, sampling))
            found |= part
            owed = [place for place in mine if place not in part]

    def _answers(self, places: Sequence[int], prompts: Sequence[Prompt], sampling: Sampling) -> dict[int, Group]:
        """Returns the groups at those of these places that workers of this trainer have answered: all, if any is
        left."""
        at_once = max(1, self.most_samples // sampling.num_samples)
        question = Question([prompts[place] for place in places], sampling, self.weights, at_once)
        return {places[i]: group for i, group in self.board.answers(question).items()}


class Ahead:
    """Implements a `RolloutSource` with bounded staleness: `take` waits for groups that were begun earlier.

    No token that a step trains on was written by weights of more than `limits.max_staleness` steps before. The first
    trainer of each machine keeps workers there, for a share of the prompts; all hand one another what these answer.
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
        """Starts the workers of `orders`, none where it has no settings (a collective). `first` is the number of the
        first prompt that the run still wants; `dtype` that of the sampling model; with `verify` workers compare the
        checksums of all weights with what they hold."""
        self.verify = verify
        self.mesh, self.prompts, self.limits, self.reward = mesh, prompts, limits, reward
        self.seed, self.dtype, self.version = seed, dtype, 0
        own = orders.program.settings
        kept = mesh.all_gather_json(len(own))
        self.keepers = [rank for rank, workers in enumerate(kept) if workers]
        owners = [rank for rank in self.keepers for _ in range(kept[rank])]
        self.board = Board(limits, first, set(own), mesh.rank, owners)
        self.fleet = Fleet(self.board, orders) if own else None
        self.samples, self.beside = orders.sampling.num_samples, None
        self.waited_s, self.waiting, self.ages = 0.0, 0, []
        self.counts, self.elsewhere = Counts(), 0

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
        """Makes these weights the newest, for what is begun from now on: one copy on each machine; see
        RolloutSource."""
        self.version = version
        if self.fleet is not None:
            self.board.publish(share(weights, version, self.dtype, self.verify))
            return
        for _ in weights:  # a collective
            pass

    def pinned(self) -> Pinned | None:
        """Returns what answers other prompts with the newest weights of now, on the trainers that keep workers; None on
        others (a collective)."""
        if self.beside is None:
            self.beside = self.mesh.side_group(ANSWER_S, self.keepers)
        if self.fleet is None:
            return None
        return Pinned(self.board, self.limits.at_once * self.samples, self.beside)

    def close(self) -> None:
        """Ends the workers; see RolloutSource."""
        if self.fleet is not None:
            self.fleet.close()

    def report(self) -> dict[str, float]:
        """Returns what metrics.jsonl says of the step that ends: see docs/rollouts/ahead.md."""
        counts, self.counts = self.counts + self.board.flush(), Counts()
        ages, self.ages = self.ages or [0], []
        waited_s, self.waited_s = self.waited_s, 0.0
        begun = max(1, counts.begun * self.samples + counts.rejected)
        return {
            "staleness_mean": sum(ages) / len(ages),
            "staleness_max": max(ages),
            "queue_groups": self.waiting,
            "trainer_idle_s": waited_s,
            "workers_idle_s": counts.rest_s,
            "workers": len(self.board.live) + self.elsewhere,
            "rejected_fraction": (counts.given_back * self.samples + counts.rejected) / begun,
            "load_bytes": counts.loaded_bytes,
            "load_s": counts.load_s,
        }

    def _shared(self, numbers: range) -> list[Group]:
        """Returns the groups of the prompts on every trainer, once workers have answered all (a collective). Raises as
        `ask` does."""
        began, found, queue = time.perf_counter(), {}, len(self.board.done)
        self.board.ask(numbers)
        while True:
            part, said = waited(self.board, partial(self.board.take, numbers))
            found |= part
            counts = asdict(self.board.flush())
            every = self.mesh.all_gather_json({**said, "owed": self.board.owed(), "queue": queue, "counts": counts})
            owners, owed = heard(every)
            self.board.deal(owners, owed)
            self._note(every)
            if not owed:
                break
        self.waited_s += time.perf_counter() - began
        ids = {number: self.prompts.prompt_ids(self.prompts.at(number, self.seed)) for number in numbers}
        return gathered(self.mesh, found, ids)

    def _note(self, every: Sequence[Said]) -> None:
        """Notes what all trainers say of their workers, for the report."""
        self.waiting = sum(said["queue"] for said in every)
        self.elsewhere = sum(said["live"] for rank, said in enumerate(every) if rank != self.mesh.rank)
        self.counts = sum((Counts(**said["counts"]) for said in every), self.counts)
