"""Provides what recipes share that make several updates on one set of samples."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from torch import Tensor

from llmtrain.engine.base import LossFn
from llmtrain.trainer.job import Job
from llmtrain.trainer.scored import score_samples
from llmtrain.types import Batch, Group, Metrics, Scores

OLD = "train_logprobs"  # the column and key of `Batch.extra` that `losses.policy.policy_loss` reads


def policy_tokens(groups: Sequence[Group]) -> int:
    """Returns how many tokens of the groups the policy wrote."""
    return sum(sum(sample.trained) for sample in chain.from_iterable(groups))


def score_old(job: Job, parts: Sequence[Sequence[Group]], epochs: int) -> None:
    """Fills in the column `train_logprobs` of samples: the log-probs of the trainer before its updates (a collective).

    `parts` are what each update of the first epoch takes. The first update of all computes its own: samples that no
    other one takes need none. Each sample is scored once, in rows such as those of its first update.
    """
    for part in parts if epochs > 1 else parts[1:]:
        score_samples(job, job.engine, part, OLD)


def columns_of(part: Sequence[Group], names: Sequence[str]) -> list[str]:
    """Returns those of the names that the samples of a part have as columns."""
    return [name for name in names if name in part[0][0].columns]


def averaged(loss: LossFn, denominator: Tensor, part: Sequence[Group]) -> LossFn:
    """Returns the loss with metrics that are means over the tokens of the part, whatever the denominator."""
    weight = float(denominator) / policy_tokens(part)

    def weighted(scores: Scores, batch: Batch) -> tuple[Tensor, Metrics]:
        total, metrics = loss(scores, batch)
        return total, {name: value if name.endswith("_max") else value * weight for name, value in metrics.items()}

    return weighted


def mean_metrics(updates: Sequence[dict[str, float]]) -> dict[str, float]:
    """Returns the mean of each metric over the updates of a step; of `logprob_gap_max` that of the first, which saw the
    weights that sampled."""
    means = {name: sum(update[name] for update in updates) / len(updates) for name in updates[0]}
    return {name: updates[0][name] if name == "logprob_gap_max" else mean for name, mean in means.items()}
