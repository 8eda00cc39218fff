"""Provides what recipes share that make several updates on one set of samples."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from torch import Tensor

from llmtrain.engine.base import LossFn
from llmtrain.types import Batch, Group, Metrics, Scores


def policy_tokens(groups: Sequence[Group]) -> int:
    """Returns how many tokens of the groups the policy wrote."""
    return sum(sum(sample.trained) for sample in chain.from_iterable(groups))


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
