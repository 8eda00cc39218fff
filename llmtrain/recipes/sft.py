"""Implements supervised fine-tuning: the loss is on the answers only."""

from __future__ import annotations

from llmtrain.config.recipes.sft import RECIPE
from llmtrain.config.schema import Config
from llmtrain.data.packing import Demonstrations
from llmtrain.losses.token import token_loss
from llmtrain.parallel.mesh import shutdown
from llmtrain.trainer.batches import count_trained, rank_samples
from llmtrain.trainer.job import join
from llmtrain.trainer.loop import train
from llmtrain.trainer.replay import Replay
from llmtrain.trainer.waste import note_padding
from llmtrain.trainer.weights import build_engine


def main(config: Config) -> None:
    """Runs `llmtrain sft` on this rank."""
    job = join(config, RECIPE)
    settings, mesh = config.train, job.mesh
    rows = Demonstrations(config.data.train, job.tokenizer, settings.seq_len, config.seed)
    replay = Replay(job)
    build_engine(job, settings.steps)

    def step(number: int) -> tuple[dict[str, float], int]:
        turn = number + job.guard.skipped_steps(number)
        samples = rank_samples(turn, settings.global_batch_seqs, settings.micro_batch_seqs, mesh)
        microbatches = [rows.batch(s) for s in samples]
        trained = count_trained(microbatches, mesh)
        microbatches, loss = replay.mix(turn, microbatches, token_loss, trained)
        note_padding(job, microbatches)
        stats = job.engine.train_step(microbatches, loss, trained)
        tokens = (settings.global_batch_seqs + replay.seqs) * settings.seq_len
        return stats.numbers(), tokens

    train(job, step)
    shutdown()
