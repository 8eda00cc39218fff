"""Implements PPO (arXiv 1707.06347) as it is used on language models (arXiv 2203.02155): rollouts -> rewards -> values
and log-probs of the reference -> advantages and returns -> policy and critic, each in minibatches -> new weights to the
generator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import chain

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llmtrain.checkpoint.roles import MAIN
from llmtrain.config.recipes.base import mismatch_of
from llmtrain.config.recipes.ppo import RECIPE, PpoConfig
from llmtrain.config.schema import Config, OptimConfig
from llmtrain.data.sampler import derive, permuted
from llmtrain.engine.base import LossFn
from llmtrain.engine.build import Role
from llmtrain.losses.gae import gae, length_lambda, token_rewards, whiten
from llmtrain.losses.kl import k1, masked_log_ratio
from llmtrain.losses.kl_control import adapted_kl_coef
from llmtrain.losses.mismatch import correction_of
from llmtrain.losses.policy import clipped, policy_loss
from llmtrain.losses.value import explained_variance, value_loss
from llmtrain.parallel.mesh import shutdown
from llmtrain.trainer.batches import group_microbatches, split_groups
from llmtrain.trainer.gate import Gate
from llmtrain.trainer.job import Job, join
from llmtrain.trainer.loop import train
from llmtrain.trainer.record import Clock, SampleLog
from llmtrain.trainer.reference import build_reference
from llmtrain.trainer.replay import Replay
from llmtrain.trainer.rollouts import build_source, closing, read_prompts, rollout_metrics, serve_rollouts
from llmtrain.trainer.scored import score_samples
from llmtrain.trainer.turns import Turns
from llmtrain.trainer.updates import OLD, averaged, columns_of, mean_metrics, policy_tokens, score_old
from llmtrain.trainer.waste import note_padding
from llmtrain.trainer.weights import build_engines, scalar_model, start_source
from llmtrain.types import Group, Sample

CRITIC = "critic"
KL_COEF = "kl_coef"  # in Job.state: the coefficient of the next step


def main(config: Config) -> None:
    """Runs `llmtrain ppo` on this rank."""
    job = join(config, RECIPE)
    if job.mesh.role == "rollout":
        serve_rollouts(job)
    else:
        run(job)
    shutdown()


def run(job: Job) -> None:
    """Trains, on a rank that is a trainer."""
    config, settings = job.config, job.config.ppo
    prompts = read_prompts(job)
    replay = Replay(job)
    build_models(job)
    job.state.setdefault(KL_COEF, settings.kl_coef)
    policy, critic, reference = job.engine, job.engines[CRITIC], build_reference(job, settings.kl_coef > 0)
    turns = Turns([policy, critic, *([] if reference is None else [reference])], settings.wait_on_host)
    source = build_source(job, prompts, settings.prompts_per_step)
    gate = Gate(config.rollout, config.engine.precision, job.mesh)
    samples = SampleLog(job)

    def step(number: int) -> tuple[dict[str, float], int]:
        clock = Clock()
        turns.of(None)
        groups = source.take(number)
        rollout_s = clock.lap()
        if reference is not None:
            turns.of(reference)
            score_samples(job, reference, groups, "ref_logprobs")
        turns.of(critic)
        score_samples(job, critic, groups, "values", of="values")
        metrics = {**rollout_metrics(groups), **credit(groups, settings, job.state[KL_COEF])}
        score_s = clock.lap()
        parts = minibatches(groups, settings, config.seed, number)
        metrics |= update_critic(job, parts, number)
        turns.of(policy)
        metrics |= update_policy(job, parts, number, replay, gate)
        train_s = clock.lap()
        source.publish(policy.full_weights(), number + 1)
        samples.write(number + 1, groups)
        times = {"rollout_s": rollout_s, "score_s": score_s, "train_s": train_s, "sync_s": clock.lap()}
        adapt_kl_coef(job, metrics, number, sum(map(len, groups)))
        tokens = sum(len(sample.ids) for sample in chain.from_iterable(groups))
        return {**metrics, **times, "weight_version": number + 1}, tokens

    with closing(source):
        source.publish(policy.full_weights(), job.step)
        train(job, step)


def build_models(job: Job) -> None:
    """Builds policy and critic, and goes on from the newest checkpoint of both."""
    config, settings, steps = job.config, job.config.ppo, job.config.train.steps
    updates, own = settings.epochs * settings.minibatches, settings.critic_from
    policy_updates = (steps - settings.critic_warmup_steps) * updates
    policy = Role(MAIN, job.model, config.parallel, config.engine, start_source(job), config.optim, policy_updates)
    value, parallel = scalar_model(job, own), config.parallel
    if own is not None:  # whose layers stage_layers does not count
        parallel = parallel.model_copy(update={"stage_layers": None})
    source, optim = start_source(job, value, own), critic_optim(config)
    build_engines(job, [policy, Role(CRITIC, value, parallel, config.engine, source, optim, steps * updates)])


def critic_optim(config: Config) -> OptimConfig:
    """Returns the optimizer of the critic: that of the policy, with a learning rate and a last one in proportion."""
    optim, lr = config.optim, config.ppo.critic_lr or config.optim.lr
    return optim.model_copy(update={"lr": lr, "min_lr": optim.min_lr * lr / optim.lr})


def credit(groups: Sequence[Group], settings: PpoConfig, kl_coef: float) -> dict[str, float]:
    """Fills in the columns `advantages` and `returns` from rewards, `values` and, where there are any, `ref_logprobs`.
    Returns the means that a step reports of them."""
    samples = list(chain.from_iterable(groups))
    written = padded([sample.trained for sample in samples]).bool()
    values, kl = padded([sample.columns["values"] for sample in samples]), divergence(samples, written)
    penalties = kl_coef * kl if settings.kl_in == "reward" else torch.zeros_like(kl)
    rewards = token_rewards(torch.tensor([sample.reward for sample in samples]).double(), penalties, written)
    returns = gae(rewards, values, written, settings.critic_lambda, settings.gamma) + values
    advantages = gae(rewards, values, written, policy_lambda(written, settings), settings.gamma)
    fill(samples, "returns", returns)
    fill(samples, "advantages", whiten(advantages, written) if settings.whiten else advantages)
    known = {"kl_sample": float(kl.sum()) / len(samples), KL_COEF: kl_coef} if has_reference(samples) else {}
    return {**value_metrics(values[written], returns[written]), **known}


def has_reference(samples: Sequence[Sample]) -> bool:
    """Says whether a reference has scored the samples."""
    return "ref_logprobs" in samples[0].columns


def divergence(samples: Sequence[Sample], written: Tensor) -> Tensor:
    """Returns log p - log p_ref of each written token, [samples, T], 0 elsewhere and without a reference."""
    if not has_reference(samples):
        return torch.zeros(written.shape, dtype=torch.float64)
    old, reference = padded([s.logprobs for s in samples]), padded([s.columns["ref_logprobs"] for s in samples])
    return k1(masked_log_ratio(reference, old, written))


def padded(rows: Sequence[Sequence[float]]) -> Tensor:
    """Returns the rows as one tensor, [rows, longest], fp64, with 0 behind the shorter ones."""
    return pad_sequence([torch.tensor(row, dtype=torch.float64) for row in rows], batch_first=True)


def fill(samples: Sequence[Sample], name: str, numbers: Tensor) -> None:
    """Fills in a column from the rows of a tensor, [samples, longest]."""
    for sample, row in zip(samples, numbers.tolist(), strict=True):
        sample.columns[name] = row[: len(sample.ids)]


def policy_lambda(written: Tensor, settings: PpoConfig) -> Tensor | float:
    """Returns the lambda of the policy's advantages: one number, or one a sample."""
    if settings.length_alpha is None:
        return settings.policy_lambda
    return length_lambda(written.sum(-1), settings.length_alpha)


def value_metrics(values: Tensor, returns: Tensor) -> dict[str, float]:
    """Returns what a step reports of the critic before its update."""
    means = {"value_mean": float(values.mean()), "return_mean": float(returns.mean())}
    return {**means, "explained_variance": explained_variance(values, returns)}


def minibatches(groups: Sequence[Group], settings: PpoConfig, seed: int, number: int) -> list[list[Group]]:
    """Returns the groups of each update of a step: an epoch takes every group once, each in an order of its own."""
    size, own = len(groups), derive(seed, f"minibatches/{number}")
    epochs = [[groups[permuted(epoch * size + i, size, own)] for i in range(size)] for epoch in range(settings.epochs)]
    return [part for order in epochs for part in split_groups(order, settings.minibatches)]


def update_critic(job: Job, parts: Sequence[Sequence[Group]], number: int) -> dict[str, float]:
    """Makes an update of the critic on each part. Returns the means of their metrics."""
    settings, engine, steps = job.config.ppo, job.engines[CRITIC], []
    denominator = tokens_per_update(job, parts)
    for turn, part in enumerate(parts, number * len(parts)):
        batches = group_microbatches(job, part, ("values", "returns"), fixed_width=False)
        loss = averaged(partial(value_loss, clip=settings.value_clip or math.inf), denominator, part)
        steps.append(engine.train_step(batches, loss, denominator, turn).numbers())
    return {
        name if name.startswith("value_") else f"{CRITIC}_{name}": mean for name, mean in mean_metrics(steps).items()
    }


def update_policy(
    job: Job, parts: Sequence[Sequence[Group]], number: int, replay: Replay, gate: Gate
) -> dict[str, float]:
    """Makes an update of the policy on each part, or none while the critic is warming up. Returns the means of their
    metrics."""
    settings, denominator, steps = job.config.ppo, tokens_per_update(job, parts), []
    if mismatch_of(job.config, "ppo").form != "off" and number >= settings.critic_warmup_steps:
        score_old(job, parts[: settings.minibatches], settings.epochs)
    for turn, part in enumerate(parts, (number - settings.critic_warmup_steps) * len(parts)):
        columns = columns_of(part, ("advantages", "ref_logprobs", OLD))
        batches = group_microbatches(job, part, columns, fixed_width=replay.seqs > 0, policy=True)
        gate.before_update(job.engine, batches, number)
        if turn < 0:
            return {"loss": 0.0, "grad_norm": 0.0, "lr": 0.0}
        mixed, loss = replay.mix(turn, batches, averaged(loss_of(job), denominator, part), denominator)
        note_padding(job, mixed)
        steps.append(job.engine.train_step(mixed, loss, denominator, turn).numbers())
    gate.after_update(steps[0]["logprob_gap_max"], number)
    return mean_metrics(steps)


def loss_of(job: Job) -> LossFn:
    """Returns the loss of the policy, with the coefficient of the KL as it is now."""
    config, settings = job.config, job.config.ppo
    return partial(
        policy_loss,
        objective=partial(clipped, low=settings.clip_low, high=settings.clip_high),
        kl_coef=job.state[KL_COEF] if settings.kl_in == "loss" else 0.0,
        correction=correction_of(*mismatch_of(config, "ppo")),
    )


def tokens_per_update(job: Job, parts: Sequence[Sequence[Group]]) -> Tensor:
    """Returns the mean number of written tokens of a part: the denominator of all, so that every token weighs the
    same."""
    written = sum(map(policy_tokens, parts))
    return torch.tensor([written / len(parts)], device=job.mesh.device)


def adapt_kl_coef(job: Job, metrics: dict[str, float], number: int, samples: int) -> None:
    """Moves the coefficient of the KL towards `ppo.kl_target`, once the policy is updated."""
    settings = job.config.ppo
    if settings.kl_target is not None and number >= settings.critic_warmup_steps:
        job.state[KL_COEF] = adapted_kl_coef(
            job.state[KL_COEF], metrics["kl_sample"], settings.kl_target, samples, settings.kl_horizon
        )
