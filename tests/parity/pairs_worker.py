"""Runs tests/parity/jobs_worker.py on preference pairs: the policy is trained by DPO against the frozen reference, and
what is the critic there is a reward model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from llmtrain.engine.base import Scorer
from llmtrain.losses.preference import bradley_terry_loss, dpo_loss
from llmtrain.types import Batch, Metrics, Scores, StepStats
from tests.parity import jobs_worker as jobs
from tests.parity.losses_worker import branch_pairs, ended_pairs


def pair_rows(step: int, rows: int) -> Batch:
    """Returns two pairs a row; the place of each last token stands beside."""
    batch = branch_pairs(step, rows)
    return replace(batch, extra={**batch.extra, "ends": ended_pairs(step, rows).loss_mask.float()})


def preference_loss(scores: Scores, batch: Batch) -> tuple[Tensor, Metrics]:
    return dpo_loss(scores, batch, "sigmoid", beta=0.5)


def reward_loss(scores: Scores, batch: Batch) -> tuple[Tensor, Metrics]:
    return bradley_terry_loss(scores, replace(batch, loss_mask=batch.extra["ends"] > 0), center_coef=0.1)


def one_step(models: Mapping[str, Scorer], batches: Sequence[Batch], denominator: Tensor) -> dict[str, StepStats]:
    """Takes one step of the job, in one process as on many."""
    for batch, scores in zip(batches, models["reference"].score(batches), strict=True):
        batch.extra["ref_logprobs"] = scores.logprobs.cpu()
    return {name: models[name].train_step(batches, loss, denominator) for name, loss in jobs.LOSSES.items()}


jobs.LOSSES |= {"policy": preference_loss, "critic": reward_loss}
jobs.step_rows, jobs.one_step = pair_rows, one_step

if __name__ == "__main__":
    jobs.main()
