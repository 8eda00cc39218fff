"""Implements supervised fine-tuning: the loss is on the answers only."""

from __future__ import annotations

from llmtrain.config.recipes.sft import RECIPE
from llmtrain.config.schema import Config
from llmtrain.data.packing import Demonstrations
from llmtrain.losses.token import token_loss
from llmtrain.parallel.mesh import shutdown
from llmtrain.trainer.batches import count_trained, demonstration_microbatches, held_out_loss
from llmtrain.trainer.job import Job, join, set_epochs
from llmtrain.trainer.loop import train
from llmtrain.trainer.record import is_due, note_evaluation
from llmtrain.trainer.replay import Replay
from llmtrain.trainer.waste import note_padding
from llmtrain.trainer.weights import build_engine


def main(config: Config) -> None:
    """Runs `llmtrain sft` on this rank."""
    job = join(config, RECIPE)
    rows = demonstrations(job, config.data.train)
    held_out = demonstrations(job, config.data.held_out) if config.train.eval_every_steps else None
    set_epochs(job, len(rows))
    settings, mesh = job.config.train, job.mesh
    replay = Replay(job)
    build_engine(job, settings.steps)

    def evaluate() -> None:
        if held_out is not None:
            scores = held_out_loss(job.engine, held_out, settings.eval_seqs, settings.micro_batch_seqs, mesh)
            note_evaluation(job, scores)

    def step(number: int) -> tuple[dict[str, float], int]:
        if number == 0 or is_due(number, settings.eval_every_steps):
            evaluate()
        turn = number + job.guard.skipped_steps(number)
        microbatches = demonstration_microbatches(job, rows, turn, fixed_width=replay.seqs > 0)
        trained = count_trained(microbatches, mesh)
        microbatches, loss = replay.mix(turn, microbatches, token_loss, trained)
        note_padding(job, microbatches)
        stats = job.engine.train_step(microbatches, loss, trained)
        tokens = (settings.global_batch_seqs + replay.seqs) * settings.seq_len
        return stats.numbers(), tokens

    train(job, step)
    evaluate()
    shutdown()


def demonstrations(job: Job, path: str) -> Demonstrations:
    """Returns the rows of a file of demonstrations, as the data section says."""
    config = job.config
    return Demonstrations(path, job.tokenizer, config.train.seq_len, config.seed, config.data.pack, config.data)
