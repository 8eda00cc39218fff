"""Implements direct preference optimization (arXiv 2305.18290): pairs -> log-probs of policy and reference -> loss of
the difference of their rewards -> step."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from llmtrain.config.recipes.dpo import RECIPE, DpoConfig
from llmtrain.config.schema import Config
from llmtrain.data.pairs import Pairs
from llmtrain.engine.base import LossFn
from llmtrain.losses.preference import dpo_loss
from llmtrain.parallel.mesh import shutdown
from llmtrain.trainer.job import Job, join, set_epochs
from llmtrain.trainer.loop import train
from llmtrain.trainer.pairs import evaluate_pairs, pair_microbatches, read_held_out, read_pairs, step_samples
from llmtrain.trainer.precomputed import COLUMN, precompute
from llmtrain.trainer.record import is_due
from llmtrain.trainer.reference import add_reference, build_reference
from llmtrain.trainer.replay import Replay
from llmtrain.trainer.waste import note_padding
from llmtrain.trainer.weights import build_engine
from llmtrain.types import Batch


def main(config: Config) -> None:
    """Runs `llmtrain dpo` on this rank."""
    run(join(config, RECIPE))
    shutdown()


def run(job: Job) -> None:
    """Trains on the pairs of `data.train`."""
    pairs, held_out = read_pairs(job, job.config.data.train), read_held_out(job)
    set_epochs(job, len(pairs))
    settings, steps = job.config.dpo, job.config.train
    replay, loss = Replay(job), loss_of(settings)
    precomputed = settings.uses_reference and settings.reference == "precomputed"
    if precomputed:
        precompute(job, {"train": pairs} if held_out is None else {"train": pairs, "held_out": held_out})
    build_engine(job, steps.steps)
    reference = build_reference(job, settings.uses_reference and not precomputed, settings.reference_waits)

    def batches_of(source: Pairs, samples: Sequence[int]) -> list[Batch]:
        columns = (COLUMN,) if precomputed else ()
        batches = pair_microbatches(job, source, samples, columns, fixed_width=replay.seqs > 0)
        add_reference(batches, reference)
        return batches

    evaluate = partial(evaluate_pairs, job, held_out, batches_of, loss)

    def step(number: int) -> tuple[dict[str, float], int]:
        measured = evaluate() if number == 0 or is_due(number, steps.eval_every_steps) else {}
        turn = number + job.guard.skipped_steps(number)
        samples = step_samples(job, turn)
        denominator = torch.tensor([float(len(samples))], device=job.mesh.device)
        batches, mixed = replay.mix(turn, batches_of(pairs, samples), loss, denominator)
        note_padding(job, batches)
        stats = job.engine.train_step(batches, mixed, denominator)
        return {**stats.numbers(), **measured}, pairs.tokens(samples) + replay.seqs * steps.seq_len

    train(job, step)
    evaluate()


def loss_of(settings: DpoConfig) -> LossFn:
    """Returns the loss that the section describes."""
    simpo = settings.loss == "simpo"
    return partial(
        dpo_loss,
        kind="sigmoid" if simpo else settings.loss,
        beta=settings.scale,
        gamma=settings.gamma if simpo else 0.0,
        label_smoothing=settings.label_smoothing,
        length_normalized=simpo or settings.length_normalized,
        nll_coef=settings.nll_coef,
    )
