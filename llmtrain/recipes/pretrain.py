"""Implements pretraining: next-token loss on packed text, some of it rearranged (`data.objectives`)."""

from __future__ import annotations

from llmtrain.config.ramp import Phase, phase_at, trained_model, with_rope
from llmtrain.config.recipes.pretrain import RECIPE
from llmtrain.config.schema import Config, ModelConfig, TrainConfig
from llmtrain.data.packing import TextRows
from llmtrain.data.shards import holds_out
from llmtrain.losses.token import token_loss
from llmtrain.observe.log import log
from llmtrain.parallel.mesh import Mesh, shutdown
from llmtrain.trainer.batches import count_trained, evaluate_text, samples_from, text_rows
from llmtrain.trainer.job import Job, data_dir, join
from llmtrain.trainer.loop import train
from llmtrain.trainer.record import is_due, note_evaluation
from llmtrain.trainer.weights import build_engine
from llmtrain.types import Batch


def main(config: Config) -> None:
    """Runs `llmtrain pretrain` on this rank."""
    job = join(config, RECIPE)
    settings, mesh = config.train, job.mesh
    rows = text_rows(config, "train", job.tokenizer)
    held_out = text_rows(config, "held_out", job.tokenizer) if holds_out(data_dir(config)) else None
    build_engine(job, settings.steps)
    model = job.model

    def evaluate() -> None:
        if held_out is None:
            return
        set_rope(job, trained_model(model, settings, job.step))  # what the weights were trained with
        note_evaluation(job, evaluate_text(job.engine, held_out, settings.eval_seqs, settings.micro_batch_seqs, mesh))

    def step(number: int) -> tuple[dict[str, float], int]:
        if number == 0 or is_due(number, settings.eval_every_steps):
            evaluate()
        phase = phase_at(settings, number)
        announce(phase, number, settings)
        set_rope(job, with_rope(model, phase))
        skipped = job.guard.skipped_tokens(number)
        microbatches = phase_batches(rows, phase, number, skipped, settings.micro_batch_seqs, mesh)
        stats = job.engine.train_step(microbatches, token_loss, count_trained(microbatches, mesh))
        shape = {"seq_len": phase.seq_len, "global_batch_seqs": phase.global_batch_seqs}
        return {**stats.numbers(), **shape}, phase.tokens_per_step

    train(job, step)
    evaluate()
    shutdown()


def set_rope(job: Job, model: ModelConfig) -> None:
    """Sets the RoPE of `model` from the next forward on, in all parts of this rank, and in what checkpoints say of it.

    Decoders read their configuration at every forward and compute the angles outside their compiled blocks.
    """
    job.model = model
    rope = {"rope_theta": model.rope_theta, "rope_scaling": model.rope_scaling}
    for part in job.engine.parts:
        part.config = part.config.model_copy(update=rope)


def phase_batches(
    rows: TextRows, phase: Phase, step: int, skipped_tokens: int, micro_seqs: int, mesh: Mesh
) -> list[Batch]:
    """Returns this rank's microbatches of a step of the phase. Shorter rows are pieces of the longest ones, in their
    order, so over the steps every token of the data order comes once, but for those that rewinds skipped before."""
    first = (phase.token_at(step) + skipped_tokens) // phase.seq_len
    samples = samples_from(first, phase.global_batch_seqs, micro_seqs, mesh)
    return [rows.batch(s, phase.seq_len) for s in samples]


def announce(phase: Phase, step: int, train: TrainConfig) -> None:
    """Logs a line where a phase begins."""
    if step == phase.first_step and (train.batch_ramp or train.seq_ramp):
        log(f"from step {step}, token {phase.first_token:,}: {phase.global_batch_seqs} x {phase.seq_len} tokens a step")
