"""Reads preference pairs, lays them out in microbatches, and measures held-out ones: what recipes of pairs share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from llmtrain.data.pairs import Pairs
from llmtrain.engine.base import LossFn
from llmtrain.observe.interval import wilson
from llmtrain.trainer.batches import group_microbatches
from llmtrain.trainer.job import Job
from llmtrain.trainer.record import note_evaluation
from llmtrain.types import Batch

PairBatches = Callable[[Pairs, Sequence[int]], list[Batch]]
"""Returns this rank's microbatches of the pairs of these sample numbers, with all columns that the loss needs."""


def read_pairs(job: Job, path: str, at_end: bool = False) -> Pairs:
    """Returns the pairs of a file, as the data section says. See `Pairs`."""
    config = job.config
    return Pairs(path, job.tokenizer, config.train.seq_len, config.seed, at_end, config.data)


def read_held_out(job: Job, at_end: bool = False) -> Pairs | None:
    """Returns the pairs of `data.held_out` if `train.eval_every_steps` asks for them, else None."""
    config = job.config
    return read_pairs(job, config.data.held_out, at_end) if config.train.eval_every_steps else None


def step_samples(job: Job, turn: int) -> range:
    """Returns the sample numbers of a step: the same on any mesh, and after any resume."""
    size = job.config.train.global_batch_seqs
    return range(turn * size, (turn + 1) * size)


def pair_microbatches(
    job: Job, pairs: Pairs, samples: Sequence[int], columns: Sequence[str] = (), fixed_width: bool = False
) -> list[Batch]:
    """Returns this rank's microbatches of the pairs of these sample numbers, each pair whole in one row, with their
    labels, margins and these `columns`. Answers were not sampled, so the temperature is 1 whatever `rollout` says."""
    groups = pairs.groups(samples)
    batches = group_microbatches(job, groups, (*pairs.columns, *columns), fixed_width, whole=True)
    for batch in batches:
        batch.temperature = 1.0
    return batches


def evaluate_pairs(job: Job, held_out: Pairs | None, batches_of: PairBatches, loss: LossFn) -> dict[str, float]:
    """Writes what `measure_pairs` says of held-out pairs to evaluations.jsonl, and returns it by its names in
    metrics.jsonl, as `held_out_accuracy`; nothing without such pairs."""
    if held_out is None:
        return {}
    scores = measure_pairs(job, held_out, batches_of, loss)
    note_evaluation(job, scores)
    return {f"held_out_{name}": value for name, value in scores.items()}


def measure_pairs(job: Job, pairs: Pairs, batches_of: PairBatches, loss: LossFn) -> dict[str, float]:
    """Returns the means of a loss and its metrics over the first `train.eval_seqs` held-out pairs, their number, and
    the ends of Wilson's interval of 95 % around the accuracy (a collective)."""
    config, sums = job.config, dict[str, float]()
    count = min(config.train.eval_seqs, len(pairs))
    block = config.train.global_batch_seqs
    for first in range(0, count, block):
        batches = batches_of(pairs, range(first, min(first + block, count)))
        for batch, scores in zip(batches, job.engine.score(batches), strict=True):
            total, metrics = loss(scores, batch.to(job.mesh.device))
            for name, value in {"loss": total, **metrics}.items():
                sums[name] = sums.get(name, 0.0) + float(value)
    totals = torch.tensor(list(sums.values()), dtype=torch.float64, device=job.mesh.device)
    dist.all_reduce(totals, group=job.mesh.groups["dp"])
    means = {name: total / count for name, total in zip(sums, totals.tolist(), strict=True)}
    low, high = wilson(means["accuracy"], count)
    return {**means, "accuracy_low": low, "accuracy_high": high, "pairs": count}
