"""Implements the loop and the loss of tests/recipes/toy_recipe.py."""

from __future__ import annotations

import torch
from torch import Tensor

from llmtrain.config.recipes import RECIPES
from llmtrain.config.schema import Config
from llmtrain.data.packing import Demonstrations
from llmtrain.losses.reduce import masked_sum
from llmtrain.parallel.mesh import shutdown
from llmtrain.trainer.batches import count_trained, demonstration_microbatches
from llmtrain.trainer.job import join
from llmtrain.trainer.loop import train
from llmtrain.trainer.weights import build_engine
from llmtrain.types import Batch, Metrics, Scores


def focal_loss(scores: Scores, batch: Batch, gamma: float) -> tuple[Tensor, Metrics]:
    """Returns -sum (1 - p)^gamma log p over the trained tokens."""
    weight = (1 - torch.exp(scores.logprobs)).clamp(min=0) ** gamma
    loss = -masked_sum(weight * scores.logprobs, batch.loss_mask)
    return loss, {"weight": masked_sum(weight, batch.loss_mask).detach()}


def main(config: Config) -> None:
    """Runs `llmtrain focal` on this rank."""
    job = join(config, RECIPES["focal"])
    settings = config.train
    rows = Demonstrations(config.data.train, job.tokenizer, settings.seq_len, config.seed)
    build_engine(job, settings.steps)

    def step(number: int) -> tuple[dict[str, float], int]:
        turn = number + job.guard.skipped_steps(number)  # further after a rewind
        batches = demonstration_microbatches(job, rows, turn)
        trained = count_trained(batches, job.mesh)
        stats = job.engine.train_step(batches, lambda s, b: focal_loss(s, b, config.focal.gamma), trained)
        return stats.numbers(), settings.global_batch_seqs * settings.seq_len

    train(job, step)
    shutdown()
