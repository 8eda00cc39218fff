"""Implements GRPO (arXiv 2402.03300): rollouts -> rewards -> advantages -> policy loss -> step -> new weights to the
generator."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import chain

import torch

from llmtrain.config.recipes.grpo import RECIPE, GrpoConfig
from llmtrain.config.schema import Config
from llmtrain.engine.base import Scorer
from llmtrain.engine.optim import learning_rate
from llmtrain.losses.advantage import group_advantages
from llmtrain.losses.policy import grpo_loss
from llmtrain.parallel.mesh import shutdown
from llmtrain.rewards import reward_metrics
from llmtrain.trainer.batches import group_microbatches, split_groups
from llmtrain.trainer.gate import Gate
from llmtrain.trainer.job import Job, join
from llmtrain.trainer.loop import train
from llmtrain.trainer.record import Clock, SampleLog
from llmtrain.trainer.reference import add_reference, build_reference
from llmtrain.trainer.replay import Replay
from llmtrain.trainer.rollouts import build_source, closing, read_prompts, serve_rollouts
from llmtrain.trainer.waste import note_padding
from llmtrain.trainer.weights import build_engine
from llmtrain.types import Batch, Group, Metrics, Sample, Scores


def main(config: Config) -> None:
    """Runs `llmtrain grpo` on this rank."""
    job = join(config, RECIPE)
    if job.mesh.role == "rollout":
        serve_rollouts(job)
    else:
        run(job)
    shutdown()


def run(job: Job) -> None:
    """Trains, on a rank that is a trainer."""
    config, settings = job.config, job.config.grpo
    prompts = read_prompts(job)
    replay = Replay(job)
    build_engine(job, config.train.steps * settings.minibatches)
    reference = build_reference(job, settings.kl_coef > 0)
    source = build_source(job, prompts, settings.prompts_per_step)
    gate = Gate(config.rollout.max_logprob_gap, config.engine.precision, job.mesh)
    source.publish(job.engine.full_weights(), job.step)
    samples = SampleLog(job)

    def step(number: int) -> tuple[dict[str, float], int]:
        clock = Clock()
        groups = source.take(number)
        credit(groups, settings.normalize_std)
        rollout_s = clock.lap()
        metrics = update(job, groups, number, reference, replay, gate)
        train_s = clock.lap()
        source.publish(job.engine.full_weights(), number + 1)
        samples.write(number + 1, groups)
        times = {"rollout_s": rollout_s, "train_s": train_s, "sync_s": clock.lap()}
        tokens = sum(len(sample.ids) for sample in chain.from_iterable(groups))
        return {**summary(groups), **metrics, **times, "weight_version": number + 1}, tokens

    with closing(source):
        train(job, step)


def credit(groups: Sequence[Group], normalize_std: bool) -> None:
    """Fills in the column `advantages`: one value a sample, for each of its tokens."""
    for group in groups:
        rewards = torch.tensor([[sample.reward for sample in group]])
        advantages = group_advantages(rewards, normalize_std)[0].tolist()
        for sample, advantage in zip(group, advantages, strict=True):
            sample.columns["advantages"] = [advantage] * len(sample.ids)


def learnable(groups: Sequence[Group]) -> list[Group]:
    """Returns the groups in which some token that the policy wrote has an advantage."""

    def learns(sample: Sample) -> bool:
        return any(a and trained for a, trained in zip(sample.columns["advantages"], sample.trained, strict=True))

    return [group for group in groups if any(map(learns, group))]


def update(
    job: Job, groups: Sequence[Group], number: int, reference: Scorer | None, replay: Replay, gate: Gate
) -> dict[str, float]:
    """Makes `grpo.minibatches` optimizer steps on one set of rollouts. Returns the means of their metrics.

    Groups whose rewards are all equal have no advantage and are left out, but their tokens count in the denominator:
    the gradient is the mean over all that was sampled. Where that leaves fewer updates, the learning rate follows the
    steps all the same.
    """
    settings = job.config.grpo
    denominator = torch.tensor([policy_tokens(groups) / settings.minibatches], device=job.mesh.device)
    steps = []
    for i, part in enumerate(split_groups(learnable(groups), settings.minibatches)):
        batches = group_microbatches(job, part, ("advantages",), fixed_width=replay.seqs > 0)
        add_reference(batches, reference)
        if i == 0:
            gate.before_update(job.engine, batches, number)
        loss = partial(policy_loss, settings=settings, weight=float(denominator) / policy_tokens(part))
        turn = number * settings.minibatches + i
        mixed, loss = replay.mix(turn, batches, loss, denominator)
        note_padding(job, mixed)
        steps.append(job.engine.train_step(mixed, loss, denominator, turn).numbers())
    if not steps:
        total = job.config.train.steps * settings.minibatches
        lr = learning_rate(number * settings.minibatches, job.config.optim, total)
        return {"loss": 0.0, "grad_norm": 0.0, "lr": lr}
    gate.after_update(steps[0]["logprob_gap_max"], number)
    means = {name: sum(s[name] for s in steps) / len(steps) for name in steps[0]}
    return {**means, "logprob_gap_max": steps[0]["logprob_gap_max"]}


def policy_tokens(groups: Sequence[Group]) -> int:
    """Returns how many tokens of the groups the policy wrote."""
    return sum(sum(sample.trained) for sample in chain.from_iterable(groups))


def policy_loss(scores: Scores, batch: Batch, settings: GrpoConfig, weight: float) -> tuple[torch.Tensor, Metrics]:
    """Returns `grpo_loss`; its metrics, means over the kept tokens, are scaled to the denominator of all tokens."""
    loss, metrics = grpo_loss(scores, batch, settings.clip_low, settings.clip_high, settings.kl_coef)
    return loss, {name: value if name.endswith("_max") else value * weight for name, value in metrics.items()}


def summary(groups: Sequence[Group]) -> dict[str, float]:
    """Returns the metrics that the rollouts alone give."""
    samples = list(chain.from_iterable(groups))
    return {
        "reward_mean": sum(s.reward for s in samples) / len(samples),
        **reward_metrics(groups),
        "kept_fraction": sum(map(len, learnable(groups))) / len(samples),
        "response_tokens_mean": sum(len(s.ids) for s in samples) / len(samples),
        "finished_fraction": sum(s.finished for s in samples) / len(samples),
    }
