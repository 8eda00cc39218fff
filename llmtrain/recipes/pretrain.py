"""Implements pretraining: next-token loss on packed text, some of it rearranged (`data.objectives`)."""

from __future__ import annotations

from typing import NamedTuple

from llmtrain.config.ramp import Phase, longest_row, phase_at, total_tokens, trained_model, with_rope
from llmtrain.config.recipes.pretrain import RECIPE
from llmtrain.config.schema import Config, ModelConfig, TrainConfig
from llmtrain.data.ahead import Ahead
from llmtrain.data.mix import Mix
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
    samples = -(-total_tokens(settings) // longest_row(settings))
    rows = text_rows(config, "train", job.tokenizer, samples)
    announce_rows(rows, samples)
    held_out = text_rows(config, "held_out", job.tokenizer) if holds_out(data_dir(config)) else None
    build_engine(job, settings.steps)
    model = job.model

    def evaluate() -> None:
        if held_out is None:
            return
        set_rope(job, trained_model(model, settings, job.step))  # what the weights were trained with
        seqs, micro = settings.eval_seqs, settings.micro_batch_seqs
        note_evaluation(job, evaluate_text(job.engine, held_out, seqs, micro, mesh, job.tokenizer))

    def step(number: int) -> tuple[dict[str, float], int]:
        if number == 0 or is_due(number, settings.eval_every_steps):
            evaluate()
        phase = phase_at(settings, number)
        announce(phase, number, settings)
        set_rope(job, with_rope(model, phase))
        skipped = job.guard.skipped_tokens(number)
        coming = range(number + 1, min(number + 1 + config.data.loader_workers, settings.steps))
        [microbatches] = loader.take([Place(number, skipped)], [Place(each, skipped) for each in coming])
        stats = job.engine.train_step(microbatches, token_loss, count_trained(microbatches, mesh))
        shape = {"seq_len": phase.seq_len, "global_batch_seqs": phase.global_batch_seqs}
        taken = (phase.token_at(number + 1) + skipped) // rows.seq_len if is_due(number + 1, every_steps) else 0
        return {**stats.numbers(), **shape, **noted_shares(rows, taken)}, phase.tokens_per_step

    def load(place: Place) -> list[Batch]:
        phase = phase_at(settings, place.step)
        return phase_batches(rows, phase, place.step, place.skipped_tokens, settings.micro_batch_seqs, mesh)

    every_steps = config.log.every_steps
    with Ahead(load, config.data.loader_workers) as loader:
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


class Place(NamedTuple):
    """Says which rows a step takes: those of the step, after the tokens that rewinds skipped before."""

    step: int
    skipped_tokens: int


def phase_batches(
    rows: TextRows, phase: Phase, step: int, skipped_tokens: int, micro_seqs: int, mesh: Mesh
) -> list[Batch]:
    """Returns this rank's microbatches of a step of the phase. Shorter rows are pieces of the longest ones, in their
    order, so over the steps every token of the data order comes once, but for those that rewinds skipped before."""
    first = (phase.token_at(step) + skipped_tokens) // phase.seq_len
    samples = samples_from(first, phase.global_batch_seqs, micro_seqs, mesh)
    return [rows.batch(s, phase.seq_len) for s in samples]


def noted_shares(rows: TextRows, samples: int) -> dict[str, float]:
    """Returns what metrics.jsonl says of where the first `samples` rows came from; {} where there is one source."""
    shares = rows.shares(samples)
    return {f"share/{name}": share for name, share in shares.items()} if len(shares) > 1 else {}


def announce_rows(rows: TextRows, samples: int) -> None:
    """Logs how the sources are mixed, and how much of the rows is padding."""
    if isinstance(rows.mix, Mix):
        for line in rows.mix.lines(rows.rows, samples):
            log(line)
    for name, share in rows.padding().items():
        log(f"{name}: {rows.rows[name]:,} rows of whole documents, {share:.2%} padding")


def announce(phase: Phase, step: int, train: TrainConfig) -> None:
    """Logs a line where a phase begins."""
    if step == phase.first_step and (train.batch_ramp or train.seq_ramp):
        log(f"from step {step}, token {phase.first_token:,}: {phase.global_batch_seqs} x {phase.seq_len} tokens a step")
