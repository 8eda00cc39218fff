"""Runs tests/parity/jobs_worker.py with the updates of PPO: the critic's values and the reference's log-probs go
through rewards, advantages and returns into both losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from llmtrain.engine.base import LossFn, Scorer
from llmtrain.losses.gae import gae, token_rewards
from llmtrain.losses.kl import k1, masked_log_ratio
from llmtrain.losses.policy import clipped, policy_loss
from llmtrain.losses.value import value_loss
from llmtrain.types import IGNORE, Batch, StepStats
from tests.parity import jobs_worker as jobs
from tests.parity import layouts_worker as parity

LOSSES: dict[str, LossFn] = {
    "policy": partial(policy_loss, objective=partial(clipped, low=0.2, high=0.28), kl_coef=0.1),
    "critic": partial(value_loss, clip=0.2),
}


def step_rows(step: int, rows: int) -> Batch:
    """Returns rows in which a third of the tokens was written by somebody else, and what the old models said."""
    batch, g = parity.global_rows(step, rows), torch.Generator().manual_seed(700 + step)
    shape = batch.labels.shape
    written = torch.rand(shape, generator=g) < 0.67
    labels = torch.randint(0, 64, shape, generator=g)
    moved, valued = 0.2 * torch.randn(2, *shape, generator=g)
    reward = torch.randn(rows, 1, generator=g).expand(shape).contiguous()
    batch.labels, batch.loss_mask = torch.where(written, labels, IGNORE), written
    batch.extra = {"moved": moved, "valued": valued, "reward": reward}
    return batch


def one_step(models: Mapping[str, Scorer], batches: Sequence[Batch], denominator: Tensor) -> dict[str, StepStats]:
    """Takes one step of the job, in one process as on many. Old models differ from the new ones, so that ratios and
    values are clipped at some tokens."""
    scores = {name: model.score(batches) for name, model in models.items()}
    for batch, policy, critic, reference in zip(batches, *scores.values(), strict=True):
        mask, extra = batch.loss_mask, batch.extra
        extra["old_logprobs"] = policy.logprobs.cpu() + extra["moved"]
        extra["ref_logprobs"] = reference.logprobs.cpu()
        extra["values"] = critic.values.cpu() + extra["valued"]
        penalties = 0.1 * k1(masked_log_ratio(extra["ref_logprobs"], extra["old_logprobs"], mask))
        rewards = token_rewards(extra["reward"][:, 0], penalties, mask)
        extra["advantages"] = gae(rewards, extra["values"], mask, 0.95)
        extra["returns"] = gae(rewards, extra["values"], mask, 1.0) + extra["values"]
    return {name: models[name].train_step(batches, loss, denominator) for name, loss in LOSSES.items()}


if __name__ == "__main__":
    jobs.LOSSES, jobs.step_rows, jobs.one_step = LOSSES, step_rows, one_step
    jobs.main()
