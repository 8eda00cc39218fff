"""Scores whole samples: what a model says of each of their tokens, before anything is laid out for an update."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch

from llmtrain.engine.base import Scorer
from llmtrain.trainer.batches import group_microbatches
from llmtrain.trainer.job import Job
from llmtrain.types import Group

NUMBER = "number"  # column: of a token's sample, counted from 1; exact in fp32 up to 2^24


def score_samples(job: Job, scorer: Scorer, groups: Sequence[Group], column: str) -> None:
    """Fills in a column of every sample: the log-prob of each token that the policy wrote, by `scorer`; 0 of others.

    The same on every trainer (a collective): each data-parallel rank scores its share, at the temperature that was
    sampled with.
    """
    samples = list(chain.from_iterable(groups))
    for number, sample in enumerate(samples, 1):
        sample.columns[NUMBER] = [float(number)] * len(sample.ids)
    batches = group_microbatches(job, groups, (NUMBER,), fixed_width=False)
    found = [torch.empty(2, 0)]
    for batch, scores in zip(batches, scorer.score(batches), strict=True):
        found.append(torch.stack([batch.extra[NUMBER], scores.logprobs.cpu()])[:, batch.loss_mask])
    own = torch.cat(found, 1).flatten().view(torch.uint8)
    values: dict[int, list[float]] = {}
    for part in job.mesh.all_gather_bytes(own):
        numbers, logprobs = part.view(torch.float32).view(2, -1)
        numbers, order = numbers.long().sort(stable=True)  # a sample lies in one row, its tokens in order
        known, counts = numbers.unique_consecutive(return_counts=True)
        pieces = logprobs[order].split(counts.tolist())
        values |= {number: piece.tolist() for number, piece in zip(known.tolist(), pieces, strict=True)}
    for number, sample in enumerate(samples, 1):
        del sample.columns[NUMBER]
        written = iter(values.get(number, ()))
        sample.columns[column] = [next(written) if trained else 0.0 for trained in sample.trained]
