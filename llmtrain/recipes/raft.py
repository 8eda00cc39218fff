"""Implements RAFT (arXiv 2304.06767), RAFT++ and Reinforce-Rej (arXiv 2504.11343), round by round: rollouts ->
rewards -> the chosen ones -> fine-tuning on them -> new weights to the generator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain

import torch

from llmtrain.config.recipes.raft import RECIPE, REJECT, RaftConfig, correction, updates_per_step
from llmtrain.config.schema import Config
from llmtrain.data.sampler import derive, permuted
from llmtrain.engine.base import LossFn
from llmtrain.engine.optim import learning_rate
from llmtrain.losses.mismatch import correction_of
from llmtrain.losses.policy import clipped, policy_loss
from llmtrain.losses.raft import raft_loss
from llmtrain.parallel.mesh import shutdown
from llmtrain.trainer.batches import group_microbatches
from llmtrain.trainer.gate import Gate
from llmtrain.trainer.job import Job, join
from llmtrain.trainer.loop import train
from llmtrain.trainer.record import Clock, SampleLog
from llmtrain.trainer.replay import Replay
from llmtrain.trainer.rollouts import build_source, closing, read_prompts, rollout_metrics, serve_rollouts
from llmtrain.trainer.updates import OLD, columns_of, mean_metrics, policy_tokens, score_old
from llmtrain.trainer.waste import note_padding
from llmtrain.trainer.weights import build_engine
from llmtrain.types import Group, Sample, attempts


def main(config: Config) -> None:
    """Runs `llmtrain raft` on this rank."""
    job = join(config, RECIPE)
    if job.mesh.role == "rollout":
        serve_rollouts(job)
    else:
        run(job)
    shutdown()


def run(job: Job) -> None:
    """Trains, on a rank that is a trainer."""
    config, settings = job.config, job.config.raft
    prompts = read_prompts(job)
    replay = Replay(job)
    build_engine(job, config.train.steps * updates_per_step(config))
    source = build_source(job, prompts, settings.prompts_per_step)
    gate = Gate(config.rollout, config.engine.precision, job.mesh)
    samples = SampleLog(job)

    def step(number: int) -> tuple[dict[str, float], int]:
        clock = Clock()
        groups = source.take(number)
        chosen = choose(groups, settings)
        rollout_s = clock.lap()
        metrics = update(job, chosen, number, replay, gate)
        train_s = clock.lap()
        source.publish(job.engine.full_weights(), number + 1)
        samples.write(number + 1, groups)
        times = {"rollout_s": rollout_s, "train_s": train_s, "sync_s": clock.lap()}
        kept = {"kept_fraction": sum(map(len, chosen)) / sum(map(len, groups)), "weight_version": number + 1}
        tokens = sum(len(sample.ids) for sample in chain.from_iterable(groups))
        return {**rollout_metrics(groups), **kept, **metrics, **times}, tokens

    with closing(source):
        source.publish(job.engine.full_weights(), job.step)
        train(job, step)


def choose(groups: Sequence[Group], settings: RaftConfig) -> list[Group]:
    """Returns the samples that a round trains on, by prompt, with the column `advantages`: 1, and -1 of wrong ones."""
    chosen = [group for group in map(partial(keep, settings=settings), groups) if group]
    for sample in chain.from_iterable(chosen):
        sample.columns["advantages"] = [1.0 if right(sample, settings) else -1.0] * len(sample.ids)
    return chosen


def keep(group: Group, settings: RaftConfig) -> Group:
    """Returns the samples of a group that are kept: those that are right, all rows of the best attempt (the first of
    equal ones), or for Reinforce-Rej the whole group, if some are right and some wrong."""
    kept = [sample for sample in group if right(sample, settings)]
    if settings.variant == REJECT:
        return group if 0 < len(kept) < len(group) else []
    if settings.keep == "best" and kept:
        return max(attempts(kept), key=lambda rows: rows[-1].reward)
    return kept


def right(sample: Sample, settings: RaftConfig) -> bool:
    """Says whether the reward of a sample is high enough, and known: where a reward failed it is not. One in which the
    policy wrote nothing is nothing to train on."""
    if sample.errors or not any(sample.trained):
        return False
    return settings.min_reward is None or sample.reward >= settings.min_reward


def update(job: Job, chosen: Sequence[Group], number: int, replay: Replay, gate: Gate) -> dict[str, float]:
    """Makes the updates of a round, each with the mean loss over the tokens of its minibatch. Returns the means of
    their metrics.

    Where fewer samples are chosen than there are minibatches, some updates are not made; the learning rate follows the
    rounds all the same.
    """
    loss, steps, total = loss_of(job.config), [], updates_per_step(job.config)
    parts = list(minibatches(job, chosen, number))
    if correction(job.config).form != "off":
        epochs = job.config.raft.epochs
        score_old(job, [part for _, part in parts[: len(parts) // epochs]], epochs)
    for turn, part in parts:
        denominator = torch.tensor([float(policy_tokens(part))], device=job.mesh.device)
        columns = columns_of(part, ("advantages", OLD))
        batches = group_microbatches(job, part, columns, fixed_width=replay.seqs > 0, policy=True)
        if not steps:
            gate.before_update(job.engine, batches, number)
        mixed, mixed_loss = replay.mix(turn, batches, loss, denominator)
        note_padding(job, mixed)
        steps.append(job.engine.train_step(mixed, mixed_loss, denominator, turn).numbers())
    if not steps:
        lr = learning_rate(number * total, job.config.optim, job.config.train.steps * total)
        return {"loss": 0.0, "grad_norm": 0.0, "lr": lr}
    gate.after_update(steps[0]["logprob_gap_max"], number)
    return mean_metrics(steps)


def minibatches(job: Job, chosen: Sequence[Group], number: int) -> Iterator[tuple[int, list[Group]]]:
    """Yields (number of the update in the run, its samples by prompt) of a round.

    The samples are dealt out in an order that is another one in every epoch, as rows are in SFT: minibatches of whole
    groups would be of few prompts each. Those of a prompt that fall into one minibatch share its tokens.
    """
    settings, size = job.config.raft, sum(map(len, chosen))
    samples = [(prompt, sample) for prompt, group in enumerate(chosen) for sample in group]
    for epoch in range(number * settings.epochs, (number + 1) * settings.epochs):
        seed = derive(job.config.seed, f"raft/{epoch}")
        order = [samples[permuted(i, size, seed)] for i in range(size)]
        for i in range(min(settings.minibatches, size)):
            part: dict[int, Group] = {}
            for prompt, sample in order[i :: settings.minibatches]:
                part.setdefault(prompt, []).append(sample)
            yield epoch * settings.minibatches + i, list(part.values())


def loss_of(config: Config) -> LossFn:
    """Returns the loss of the variant."""
    settings = config.raft
    if settings.variant == "raft":
        return raft_loss
    objective = partial(clipped, low=settings.clip_low, high=settings.clip_high)
    return partial(policy_loss, objective=objective, correction=correction_of(*correction(config)))
