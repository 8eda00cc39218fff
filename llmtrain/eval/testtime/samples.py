"""Makes the points of votes and of the best by a score, among n of the same samples for n = 1, 2, 4, ..."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from statistics import fmean
from typing import Any

from llmtrain.config.testtime import TestTimeConfig
from llmtrain.data.sampler import derive
from llmtrain.eval.passk import ks_up_to
from llmtrain.eval.testtime.best_of import best_of_accuracy
from llmtrain.eval.testtime.points import Line, point, rows_of
from llmtrain.eval.testtime.problems import Graded, Problems, Spoken, Written, judged, weight_of
from llmtrain.eval.testtime.vote import majority_accuracy, weighted_accuracy


@dataclass(frozen=True)
class Sampled:
    """Holds the samples of all problems, a row for each problem."""

    written: Sequence[Written]  # of all rows, one after the other
    answers: Sequence[Sequence[int | None]]
    right: Sequence[Sequence[bool]]
    seed: int

    @property
    def sizes(self) -> list[int]:
        """Returns the numbers of samples that choose."""
        return ks_up_to(len(self.right[0]))

    def rows(self, values: Sequence[Any]) -> list[Sequence[Any]]:
        """Returns a row for each problem of values of all samples."""
        return rows_of(values, len(self.right[0]))

    def points(self, name: str, by_problem: Sequence[Sequence[float]]) -> Iterator[Line]:
        """Yields a point for each size from the accuracies of each problem by size."""
        lengths = [fmean(len(each.ids) for each in own) for own in self.rows(self.written)]
        for n, accuracy in zip(self.sizes, zip(*by_problem, strict=True), strict=True):
            yield name, point([n * length for length in lengths], accuracy, self.seed, n=n)


def of_samples(
    settings: TestTimeConfig, seed: int, model: Spoken, problems: Problems, graded: Mapping[str, Graded]
) -> Iterator[Line]:
    """Yields the points of all methods that choose among samples, which are drawn once."""
    groups = model.generator.generate(problems.prompts, replace(model.sampling, num_samples=settings.samples))
    written = [Written(i, s.ids, s.logprobs) for i, group in enumerate(groups) for s in group]
    answers = [problems.classes([problems.decode(s.ids) for s in group]) for group in groups]
    sampled = Sampled(written, answers, rows_of(judged(problems, written), settings.samples), seed)
    if "majority" in settings.methods:
        pairs = zip(answers, sampled.right, strict=True)
        yield from sampled.points("majority", [majority_accuracy(*each, sampled.sizes) for each in pairs])
    for name, (grade, kind) in graded.items():
        scores = sampled.rows(grade(written))
        if "weighted_majority" in settings.methods:
            yield from weighted(sampled, f"weighted majority by {name}", scores, kind, settings.subsets)
        if "best_of" in settings.methods:
            pairs = zip(scores, sampled.right, strict=True)
            yield from sampled.points(f"best of n by {name}", [best_of_accuracy(*p, sampled.sizes) for p in pairs])


def weighted(
    sampled: Sampled, name: str, scores: Sequence[Sequence[float | None]], kind: str, subsets: int
) -> Iterator[Line]:
    """Yields the points of a vote that scores weigh, each with the standard error that subsets were drawn with."""
    votes = []
    for i, (answers, own, right) in enumerate(zip(sampled.answers, scores, sampled.right, strict=True)):
        weights = [weight_of(score, kind) for score in own]
        stream = derive(sampled.seed, f"subsets/{i}")
        votes.append(weighted_accuracy(answers, weights, right, sampled.sizes, subsets, stream))
    errors = [sqrt(sum(variance for _, variance in own)) / len(votes) for own in zip(*votes, strict=True)]
    lines = sampled.points(name, [[mean for mean, _ in own] for own in votes])
    for (line, each), error in zip(lines, errors, strict=True):
        yield line, {**each, "subset_error": error}
