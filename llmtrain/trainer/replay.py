"""Mixes pretraining text into a later stage, so that the language is not forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from llmtrain.engine.base import LossFn
from llmtrain.losses.token import token_loss
from llmtrain.trainer.batches import count_trained, rank_samples, text_rows
from llmtrain.trainer.job import Job
from llmtrain.types import Batch, Metrics, Scores

MARK = "replay"  # key in Batch.extra


class Replay:
    """Adds `data.replay_seqs` rows of text to a step, and their mean loss with weight `data.replay_weight`."""

    def __init__(self, job: Job) -> None:
        config, self.mesh = job.config, job.mesh
        self.seqs, self.weight = config.data.replay_seqs, config.data.replay_weight
        self.micro_seqs = config.train.micro_batch_seqs
        samples = config.train.steps * self.seqs
        self.rows = text_rows(config, "train", job.tokenizer, samples) if self.seqs else None

    def mix(
        self, step: int, microbatches: Sequence[Batch], loss: LossFn, denominator: Tensor
    ) -> tuple[list[Batch], LossFn]:
        """Returns the microbatches with the text rows behind them, and a loss that tells them apart.

        `denominator` is that of `loss`; the text's own mean is scaled to it.
        """
        if self.rows is None:
            return list(microbatches), loss
        samples = rank_samples(step, self.seqs, self.micro_seqs, self.mesh)
        text = [like(self.rows.batch(s), microbatches[0]) for s in samples]
        scale = float(denominator) / float(count_trained(text, self.mesh))

        def mixed(scores: Scores, batch: Batch) -> tuple[Tensor, Metrics]:
            if MARK not in batch.extra:
                return loss(scores, batch)
            nll, _ = token_loss(scores, batch)
            return nll * scale * self.weight, {"replay_loss": nll.detach() * scale}

        return [*microbatches, *text], mixed


def like(text: Batch, other: Batch) -> Batch:
    """Returns the text rows with the fields of another batch: a pipeline wants all microbatches of one form."""
    filler, asked = torch.zeros_like(text.input_ids), other.candidates
    return replace(
        text,
        candidates=None if asked is None else filler[..., None].repeat(1, 1, asked.size(-1)),
        segment_ids=filler if text.segment_ids is None and other.segment_ids is not None else text.segment_ids,
        branch_ids=None if other.branch_ids is None else filler,
        ends=None if other.ends is None else filler + filler.size(1),
        experts=None if (given := other.experts) is None else given.new_full((*filler.shape, given.size(-1)), -1),
        extra={MARK: filler},
    )
