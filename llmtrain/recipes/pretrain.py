"""Pretraining: next-token loss on packed text, some of it rearranged (`data.objectives`)."""

from __future__ import annotations

from llmtrain.config.ramp import phase_at, trained_model, with_rope
from llmtrain.config.schema import Config
from llmtrain.losses.token import token_loss
from llmtrain.parallel.mesh import shutdown
from llmtrain.trainer.assemble import build_engine, join
from llmtrain.trainer.batches import count_trained, evaluate_text, text_rows
from llmtrain.trainer.loop import is_due, note_evaluation, train
from llmtrain.trainer.ramp import announce, phase_batches, set_rope


def main(config: Config) -> None:
    """`llmtrain pretrain`."""
    job = join(config)
    settings, mesh = config.train, job.mesh
    rows, held_out = (text_rows(config, split, job.tokenizer) for split in ("train", "held_out"))
    build_engine(job, settings.steps)
    model = job.model

    def evaluate() -> None:
        set_rope(job, trained_model(model, settings, job.step))  # what the weights were trained with
        note_evaluation(job, evaluate_text(job.engine, held_out, settings.eval_seqs, settings.micro_batch_seqs, mesh))

    def step(number: int) -> dict[str, float]:
        if number == 0 or is_due(number, settings.eval_every_steps):
            evaluate()
        phase = phase_at(settings, number)
        announce(phase, number, settings)
        set_rope(job, with_rope(model, phase))
        skipped = job.guard.skipped_tokens(number)
        microbatches = phase_batches(rows, phase, number, skipped, settings.micro_batch_seqs, mesh)
        stats = job.engine.train_step(microbatches, token_loss, count_trained(microbatches, mesh))
        shape = {"seq_len": phase.seq_len, "global_batch_seqs": phase.global_batch_seqs}
        measured = {"loss": stats.loss, "grad_norm": stats.grad_norm, "lr": stats.lr, **stats.metrics}
        return {**measured, **shape, "tokens": phase.tokens_per_step}

    train(job, step)
    evaluate()
    shutdown()
