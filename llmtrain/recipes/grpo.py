"""GRPO (arXiv 2402.03300): rollout -> reward -> advantage -> policy loss -> step -> weight sync."""

from __future__ import annotations

import time
from functools import partial

import torch

from llmtrain.arch.pipeline import plan_stages
from llmtrain.config.schema import Config
from llmtrain.data.prompts import PromptSet
from llmtrain.engine.optim import learning_rate
from llmtrain.engine.precision import compute_dtype
from llmtrain.losses.policy import grpo_loss
from llmtrain.parallel.mesh import shutdown
from llmtrain.parallel.plan import materialize, parallelize
from llmtrain.parallel.scoring import FrozenModel
from llmtrain.trainer.experience import collect, learnable, microbatches_of, split_groups
from llmtrain.trainer.job import Job, join
from llmtrain.trainer.loop import train
from llmtrain.trainer.record import SampleLog
from llmtrain.trainer.replay import Replay
from llmtrain.trainer.rollouts import Disagreement, Gate, build_generator, serve_rollouts
from llmtrain.trainer.weights import build_engine, start_source
from llmtrain.types import Batch, Experience, Metrics, Scores


def main(config: Config) -> None:
    """`llmtrain grpo`."""
    job = join(config, generates=True)
    if job.mesh.role == "rollout":
        serve_rollouts(job)
    else:
        run(job)
    shutdown()


def run(job: Job) -> None:
    """The trainers' side."""
    config = job.config
    prompts = PromptSet(config.data.train, job.tokenizer, config.train.seq_len - config.rollout.max_new_tokens)
    replay = Replay(job)
    build_engine(job, config.train.steps * config.grpo.minibatches)
    reference = build_reference(job)
    generator = build_generator(job)
    gate = Gate(config, job.mesh)
    generator.load_weights(job.engine.full_weights(), job.step)
    samples = SampleLog(job)

    def step(number: int) -> dict[str, float]:
        clock = Clock()
        experiences = collect(job, generator, prompts, number)
        rollout_s = clock.lap()
        metrics = update(job, experiences, number, reference, replay, gate)
        train_s = clock.lap()
        generator.load_weights(job.engine.full_weights(), number + 1)
        samples.write(number + 1, experiences)
        return {
            **summary(experiences),
            **metrics,
            "rollout_s": rollout_s,
            "train_s": train_s,
            "sync_s": clock.lap(),
            "weight_version": number + 1,
        }

    try:
        train(job, step)
    except (SystemExit, FloatingPointError, Disagreement, OSError):  # raised on all trainers together
        generator.close()
        raise
    generator.close()


def update(
    job: Job, experiences: list[Experience], number: int, reference: FrozenModel | None, replay: Replay, gate: Gate
) -> dict[str, float]:
    """`grpo.minibatches` optimizer steps on one set of rollouts. Returns the means of their metrics.

    Groups whose rewards are all equal have no advantage and are left out, but their tokens count in the denominator:
    the gradient is the mean over all that was sampled.
    """
    settings = job.config.grpo
    all_tokens = sum(len(e.rollout.completion_ids) for e in experiences)
    denominator = torch.tensor([all_tokens / settings.minibatches], device=job.mesh.device)
    steps = []
    for i, groups in enumerate(split_groups(learnable(experiences), settings.minibatches)):
        batches = microbatches_of(job, groups, fixed_width=replay.seqs > 0)
        add_reference(batches, reference)
        if i == 0:
            gate.before_update(job, batches, number)
        kept_tokens = sum(len(e.rollout.completion_ids) for group in groups for e in group)
        loss = partial(policy_loss, job=job, weight=float(denominator) / kept_tokens)
        turn = number * settings.minibatches + i
        mixed, loss = replay.mix(turn, batches, loss, denominator)
        stats = job.engine.train_step(mixed, loss, denominator)
        steps.append({"loss": stats.loss, "grad_norm": stats.grad_norm, "lr": stats.lr, **stats.metrics})
    if not steps:
        lr = learning_rate(job.engine.step, job.config.optim, job.config.train.steps * settings.minibatches)
        return {"loss": 0.0, "grad_norm": 0.0, "lr": lr}
    gate.after_update(steps[0]["logprob_gap_max"], number)
    means = {name: sum(s[name] for s in steps) / len(steps) for name in steps[0]}
    return {**means, "logprob_gap_max": steps[0]["logprob_gap_max"]}


def policy_loss(scores: Scores, batch: Batch, job: Job, weight: float) -> tuple[torch.Tensor, Metrics]:
    """`grpo_loss`; its metrics, means over the kept tokens, scaled to the denominator of all tokens."""
    settings = job.config.grpo
    loss, metrics = grpo_loss(scores, batch, settings.clip_low, settings.clip_high, settings.kl_coef)
    return loss, {name: value if name.endswith("_max") else value * weight for name, value in metrics.items()}


def build_reference(job: Job) -> FrozenModel | None:
    """The policy at the start, when a KL penalty asks for it."""
    config = job.config
    if config.grpo.kl_coef == 0:
        return None
    parts = parallelize(job.model, job.mesh, config.parallel, config.engine)
    materialize(parts, job.mesh, start_source(job))
    return FrozenModel(parts, plan_stages(job.model, config.parallel), job.mesh, compute_dtype(config.engine.precision))


def add_reference(batches: list[Batch], reference: FrozenModel | None) -> None:
    """extra["ref_logprobs"], in place."""
    if reference is not None:
        for batch, scores in zip(batches, reference.score(batches), strict=True):
            batch.extra["ref_logprobs"] = scores.logprobs.cpu()


def summary(experiences: list[Experience]) -> dict[str, float]:
    """What the rollouts alone tell."""
    count = len(experiences)
    lengths = [len(e.rollout.completion_ids) for e in experiences]
    return {
        "reward_mean": sum(e.reward for e in experiences) / count,
        "kept_fraction": sum(map(len, learnable(experiences))) / count,
        "response_tokens_mean": sum(lengths) / count,
        "finished_fraction": sum(e.rollout.finished for e in experiences) / count,
        "tokens": sum(lengths),
    }


class Clock:
    """Seconds between laps."""

    def __init__(self) -> None:
        self.last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last call."""
        now = time.perf_counter()
        self.last, passed = now, now - self.last
        return passed
