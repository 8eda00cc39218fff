"""Pretraining: next-token loss on packed text."""

from __future__ import annotations

from llmtrain.config.schema import Config
from llmtrain.losses.token import token_loss
from llmtrain.parallel.mesh import shutdown
from llmtrain.trainer.assemble import build_engine, join
from llmtrain.trainer.batches import count_trained, evaluate_text, rank_samples, text_rows
from llmtrain.trainer.loop import is_due, note_evaluation, train


def main(config: Config) -> None:
    """`llmtrain pretrain`."""
    job = join(config)
    settings, mesh = config.train, job.mesh
    rows, held_out = (text_rows(config, split, job.tokenizer) for split in ("train", "held_out"))
    build_engine(job, settings.steps)

    def evaluate() -> None:
        note_evaluation(job, evaluate_text(job.engine, held_out, settings.eval_seqs, settings.micro_batch_seqs, mesh))

    def step(number: int) -> dict[str, float]:
        if number == 0 or is_due(number, settings.eval_every_steps):
            evaluate()
        samples = rank_samples(number, settings.global_batch_seqs, settings.micro_batch_seqs, mesh)
        microbatches = [rows.batch(s) for s in samples]
        stats = job.engine.train_step(microbatches, token_loss, count_trained(microbatches, mesh))
        tokens = settings.global_batch_seqs * settings.seq_len
        return {"loss": stats.loss, "grad_norm": stats.grad_norm, "lr": stats.lr, "tokens": tokens}

    train(job, step)
    evaluate()
    shutdown()
