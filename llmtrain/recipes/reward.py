"""Implements reward modelling (arXiv 2203.02155): pairs -> values at the ends of their answers -> loss of the
difference -> step."""

from __future__ import annotations

from functools import partial

import torch

from llmtrain.config.recipes.reward import RECIPE
from llmtrain.config.schema import Config
from llmtrain.losses.preference import bradley_terry_loss
from llmtrain.parallel.mesh import shutdown
from llmtrain.trainer.job import Job, join, set_epochs
from llmtrain.trainer.loop import train
from llmtrain.trainer.pairs import evaluate_pairs, pair_microbatches, read_held_out, read_pairs, step_samples
from llmtrain.trainer.record import is_due
from llmtrain.trainer.waste import note_padding
from llmtrain.trainer.weights import build_engine


def main(config: Config) -> None:
    """Runs `llmtrain reward` on this rank."""
    run(join(config, RECIPE))
    shutdown()


def run(job: Job) -> None:
    """Trains on the pairs of `data.train`."""
    pairs, held_out = read_pairs(job, job.config.data.train, at_end=True), read_held_out(job, at_end=True)
    set_epochs(job, len(pairs))
    steps = job.config.train
    loss = partial(bradley_terry_loss, center_coef=job.config.reward.center_coef)
    batches_of = partial(pair_microbatches, job)
    build_engine(job, steps.steps)
    evaluate = partial(evaluate_pairs, job, held_out, batches_of, loss)

    def step(number: int) -> tuple[dict[str, float], int]:
        measured = evaluate() if number == 0 or is_due(number, steps.eval_every_steps) else {}
        samples = step_samples(job, number + job.guard.skipped_steps(number))
        batches = batches_of(pairs, samples)
        note_padding(job, batches)
        denominator = torch.tensor([float(len(samples))], device=job.mesh.device)
        stats = job.engine.train_step(batches, loss, denominator)
        return {**stats.numbers(), **measured}, pairs.tokens(samples)

    train(job, step)
    evaluate()
