"""Stands in for what a recipe works with, so that its wiring is tested by absolute values: no model, no sampling."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmtrain.engine.base import LossFn
from llmtrain.types import Batch, Group, Prompt, Sample, Sampling, Scores, StepStats

LR, NORM = 0.25, 0.5  # what every step reports


def shifted(shift: float) -> Callable[[Batch], Scores]:
    """Returns scores whose log-probs are those of the generator (0 in rows without) plus `shift`."""

    def scores(batch: Batch) -> Scores:
        old = batch.extra.get("old_logprobs", torch.zeros(batch.labels.shape))
        logprobs = torch.where(batch.loss_mask, old + shift, 0.0)
        return Scores(logprobs, torch.where(batch.loss_mask, 2.0, 0.0))

    return scores


@dataclass
class StubScorer:
    """Scores every batch by a function, and keeps what it was given."""

    scores: Callable[[Batch], Scores]
    scored: list[Sequence[Batch]] = field(default_factory=list)
    parts: list[object] = field(default_factory=list)
    here: bool = True  # on the device

    def to_host(self) -> None:
        self.here = False

    def to_device(self) -> None:
        self.here = True

    def score(self, batches: Sequence[Batch]) -> list[Scores]:
        self.scored.append(batches)
        return [self.scores(batch) for batch in batches]


@dataclass
class StubEngine(StubScorer):
    """Keeps what each update was given, and computes its loss and metrics as an engine of one rank does."""

    updates: list[tuple[Sequence[Batch], float, StepStats]] = field(default_factory=list)
    step: int = 0
    positions: list[int | None] = field(default_factory=list)  # in the schedule

    def train_step(
        self, microbatches: Sequence[Batch], loss: LossFn, denominator: Tensor, position: int | None = None
    ) -> StepStats:
        total, sums, maxima = 0.0, {}, {}
        for batch in microbatches:
            value, metrics = loss(self.scores(batch), batch)
            total += float(value)
            for name, each in metrics.items():
                if name.endswith("_max"):
                    maxima[name] = max(maxima.get(name, float(each)), float(each))
                else:
                    sums[name] = sums.get(name, 0.0) + float(each) / float(denominator)
        stats = StepStats(total / float(denominator), NORM, LR, {**sums, **maxima})
        self.updates.append((microbatches, float(denominator), stats))
        self.positions.append(position)
        self.step += 1
        return stats

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yields one tensor that holds the number of updates."""
        yield "updates", torch.tensor(self.step)


def replays(batch: Batch) -> bool:
    """Tells whether a batch has the experts that a StubGenerator gave each input, and none elsewhere."""
    expected = batch.input_ids % 7 if "old_logprobs" in batch.extra else torch.full_like(batch.input_ids, -1)
    if batch.segment_ids is not None:
        expected = expected.masked_fill(batch.segment_ids < 0, -1)
    return batch.experts is not None and batch.experts[..., 0].equal(expected.short())


@dataclass
class StubGenerator:
    """Answers each prompt by `answers(prompt)`: lists of token ids. Keeps requests and published weights."""

    answers: Callable[[Prompt], list[list[int]]]
    stop_id: int
    asked: list[tuple[Sequence[Prompt], Sampling]] = field(default_factory=list)
    loaded: list[tuple[int, int]] = field(default_factory=list)  # (version, updates)
    closed: bool = False
    experts: bool = False  # samples have an expert for each input: its id modulo 7

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        self.asked.append((prompts, sampling))
        return [[self._sample(prompt, ids) for ids in self.answers(prompt)] for prompt in prompts]

    def _sample(self, prompt: Prompt, ids: list[int]) -> Sample:
        n, version = len(ids), self.loaded[-1][0]
        own, ends = (ids, [True] * n, [-1.0] * n, [version] * n), ids[-1] == self.stop_id
        chosen = torch.tensor([[x % 7] for x in [*prompt.ids, *ids[:-1]]]) if self.experts else None
        return Sample(prompt.ids, *own, finished=ends, experts=chosen)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        self.loaded.append((version, int(dict(weights)["updates"])))

    def close(self) -> None:
        self.closed = True
