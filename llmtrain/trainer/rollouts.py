"""Which generator a stage samples with, and the gate that compares it with the trainer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from llmtrain.arch.adapters import without_adapters
from llmtrain.config.schema import Config
from llmtrain.engine.precision import compute_dtype
from llmtrain.model.decoder import Decoder
from llmtrain.parallel.mesh import Mesh
from llmtrain.rollout.native import NativeGenerator
from llmtrain.rollout.worker import ColocatedGenerator, RemoteGenerator, serve
from llmtrain.trainer.job import Job
from llmtrain.types import Batch


def local_generator(job: Job) -> NativeGenerator:
    """A whole model on this rank; its weights come with the first sync."""
    with torch.device("meta"):
        model = Decoder(without_adapters(job.model))
    model = model.to(compute_dtype(job.config.engine.precision)).to_empty(device=job.mesh.device)
    if job.model.tie_embeddings:
        model.head.weight = model.embed.weight
    r = job.config.rollout
    return NativeGenerator(model, r.max_batch_seqs, job.mesh.device, job.config.train.seq_len)


def build_generator(job: Job) -> ColocatedGenerator | RemoteGenerator:
    """By `rollout.placement`."""
    if job.config.rollout.placement == "separate":
        job.mesh.link.await_trainers("model", job.mesh.role)
        return RemoteGenerator(job.mesh.link, job.mesh.num_trainers)
    return ColocatedGenerator(local_generator(job), job.mesh)


def serve_rollouts(job: Job) -> None:
    """The whole life of a rollout rank."""
    generator = local_generator(job)
    job.mesh.link.await_trainers("model", job.mesh.role)
    serve(job.mesh.link, generator, job.mesh.rank, job.mesh.size)


class Disagreement(RuntimeError):
    """Generator and trainer differ; raised on every trainer."""


class Gate:
    """Stops the run when generator and trainer disagree about the log-probs of what was sampled.

    At the first step everything is scored once more before the update. Later steps cost nothing: the first update on
    a set of rollouts sees the same weights as the generator did, so its `logprob_gap_max` is the comparison.
    """

    def __init__(self, config: Config, mesh: Mesh) -> None:
        default = 1e-3 if config.engine.precision == "fp32" else 1.0
        self.limit = config.rollout.max_logprob_gap or default
        self.mesh, self.passed = mesh, False

    def before_update(self, job: Job, batches: Sequence[Batch], number: int) -> None:
        """The first step's comparison (a collective)."""
        if self.passed:
            return
        gaps = [0.0]
        for batch, scores in zip(batches, job.engine.score(batches), strict=True):
            difference = (scores.logprobs.cpu() - batch.extra["old_logprobs"]).abs().masked_fill(~batch.loss_mask, 0.0)
            gaps.append(float(difference.nan_to_num(math.inf).max()))  # max() would lose a NaN
        self.after_update(max(self.mesh.all_gather_json(max(gaps))), number)
        self.passed = True

    def after_update(self, gap: float, number: int) -> None:
        """Raises Disagreement when the gap is above `rollout.max_logprob_gap`."""
        if not math.isfinite(gap) or gap > self.limit:
            raise Disagreement(
                f"step {number + 1}: generator and trainer differ by {gap:.4g} in a token's log-prob, more than "
                f"rollout.max_logprob_gap={self.limit}: they do not hold the same weights, or compute in too "
                "different a precision; try engine.precision=fp32, or raise the limit if the gap is understood"
            )
