"""The shape of a pretraining step while batch and rows grow; `config.ramp` says when."""

from __future__ import annotations

from llmtrain.config.ramp import Phase
from llmtrain.config.schema import ModelConfig, TrainConfig
from llmtrain.data.packing import TextRows
from llmtrain.observe.log import log
from llmtrain.parallel.mesh import Mesh
from llmtrain.trainer.assemble import Job
from llmtrain.trainer.batches import samples_from
from llmtrain.types import Batch


def set_rope(job: Job, model: ModelConfig) -> None:
    """Rotate as `model` says from the next forward on, in all parts of this rank, and in what checkpoints say of it.

    Decoders read their configuration at every forward and compute the angles outside their compiled blocks.
    """
    job.model = model
    rope = {"rope_theta": model.rope_theta, "rope_scaling": model.rope_scaling}
    for part in job.engine.parts:
        part.config = part.config.model_copy(update=rope)


def phase_batches(
    rows: TextRows, phase: Phase, step: int, skipped_tokens: int, micro_seqs: int, mesh: Mesh
) -> list[Batch]:
    """This rank's microbatches of a step of the phase. Shorter rows are pieces of the longest ones, in their order, so
    over the steps every token of the data order comes once, but for those that rewinds skipped before."""
    first = (phase.token_at(step) + skipped_tokens) // phase.seq_len
    samples = samples_from(first, phase.global_batch_seqs, micro_seqs, mesh)
    return [rows.batch(s, phase.seq_len) for s in samples]


def announce(phase: Phase, step: int, train: TrainConfig) -> None:
    """A line where a phase begins."""
    if step == phase.first_step and (train.batch_ramp or train.seq_ramp):
        log(f"from step {step}, token {phase.first_token:,}: {phase.global_batch_seqs} x {phase.seq_len} tokens a step")
