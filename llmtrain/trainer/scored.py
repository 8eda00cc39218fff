"""Scores whole samples: what a model says of each of their tokens, before anything is laid out for an update."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Literal

import torch
import torch.distributed as dist

from llmtrain.engine.base import Scorer
from llmtrain.trainer.batches import group_microbatches
from llmtrain.trainer.job import Job
from llmtrain.types import Group

SAMPLE, TOKEN = "sample_number", "token_number"  # columns in fp32, which holds whole numbers up to 2^24 exactly


def score_samples(
    job: Job,
    scorer: Scorer,
    groups: Sequence[Group],
    column: str,
    of: Literal["logprobs", "entropies", "values"] = "logprobs",
) -> None:
    """Fills in a column of every sample: what `scorer` says of each token that the policy wrote; 0 of others.

    The same on every trainer (a collective): each data-parallel rank scores its share, at the temperature that was
    sampled with. `of` is the field of `Scores`; a value is that of the state before the token.
    """
    samples = list(chain.from_iterable(groups))
    starts = [0, *accumulate(len(sample.ids) for sample in samples)]
    for number, sample in enumerate(samples):
        count = len(sample.ids)
        sample.columns |= {SAMPLE: [float(number)] * count, TOKEN: [float(i) for i in range(count)]}
    batches = group_microbatches(job, groups, (SAMPLE, TOKEN), policy=scorer is job.engine)
    flat, first = torch.zeros(starts[-1]), torch.tensor(starts)
    for batch, scores in zip(batches, scorer.score(batches), strict=True):
        sample_of, token_of = (batch.extra[name][batch.loss_mask].long() for name in (SAMPLE, TOKEN))
        flat[first[sample_of] + token_of] = getattr(scores, of).cpu()[batch.loss_mask]
    flat = flat.to(job.mesh.device)
    dist.all_reduce(flat, group=job.mesh.groups["dp"])  # each token is 0 on all ranks but one
    numbers = flat.tolist()
    for sample, start, end in zip(samples, starts[:-1], starts[1:], strict=True):
        del sample.columns[SAMPLE], sample.columns[TOKEN]
        sample.columns[column] = numbers[start:end]
