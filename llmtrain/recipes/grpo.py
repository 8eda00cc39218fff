"""Implements GRPO (arXiv 2402.03300) and its kin: rollouts -> rewards -> advantages -> policy loss -> steps -> new
weights to the generator."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import chain

import torch

from llmtrain.config.recipes.base import mismatch_of
from llmtrain.config.recipes.grpo import RECIPE, GrpoConfig, updates_per_step
from llmtrain.config.schema import Config
from llmtrain.engine.base import LossFn, Scorer
from llmtrain.engine.optim import learning_rate
from llmtrain.losses.advantage import group_advantages, has_spread, overlong_penalty
from llmtrain.losses.kl import KL_FORMS
from llmtrain.losses.mismatch import correction_of
from llmtrain.losses.policy import capped, clipped, clipped_by_sequence, policy_loss
from llmtrain.losses.reduce import masked_sum
from llmtrain.parallel.mesh import shutdown
from llmtrain.rollout.generator import RolloutSource
from llmtrain.trainer.batches import group_microbatches, split_groups
from llmtrain.trainer.gate import Gate
from llmtrain.trainer.job import Job, join
from llmtrain.trainer.loop import train
from llmtrain.trainer.record import Clock, SampleLog
from llmtrain.trainer.reference import add_reference, build_reference
from llmtrain.trainer.replay import Replay
from llmtrain.trainer.rollouts import (
    PROMPTS,
    build_source,
    closing,
    read_prompts,
    rollout_metrics,
    serve_rollouts,
    take_spread,
)
from llmtrain.trainer.scored import score_samples
from llmtrain.trainer.updates import OLD, averaged, columns_of, mean_metrics, policy_tokens, score_old
from llmtrain.trainer.waste import note_padding
from llmtrain.trainer.weights import build_engine
from llmtrain.types import Batch, Group, Sample, attempts


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
    build_engine(job, config.train.steps * updates_per_step(config))
    reference = build_reference(job, settings.kl_coef > 0, settings.reference_waits)
    source = build_source(job, prompts, settings.prompts_per_step)
    gate = Gate(config.rollout, config.engine.precision, job.mesh)
    samples = SampleLog(job)

    def step(number: int) -> tuple[dict[str, float], int]:
        clock = Clock()
        groups, sampled = sample(job, source, number)
        if reference is not None and settings.kl_in == "reward":
            score_samples(job, reference, groups, "ref_logprobs")
        credit(groups, settings)
        rollout_s = clock.lap()
        metrics = update(job, groups, number, reference, replay, gate)
        train_s = clock.lap()
        source.publish(job.engine.full_weights(), number + 1)
        samples.write(number + 1, sampled)
        times = {"rollout_s": rollout_s, "train_s": train_s, "sync_s": clock.lap()}
        tokens = sum(len(each.ids) for each in chain.from_iterable(sampled))
        own = {**summary(groups, sampled, settings), "prompts": job.state[PROMPTS], "weight_version": number + 1}
        return {**own, **metrics, **times}, tokens

    with closing(source):
        source.publish(job.engine.full_weights(), job.step)
        train(job, step)


def sample(job: Job, source: RolloutSource, number: int) -> tuple[list[Group], list[Group]]:
    """Returns the groups that the step trains on, and all that were sampled for it, long completions punished."""
    settings, limit = job.config.grpo, job.config.rollout.max_new_tokens

    def spread(group: Group) -> bool:
        return has_spread([sample.reward for sample in group])

    def ask(numbers: range) -> list[Group]:
        groups = source.ask(numbers)
        for sample in chain.from_iterable(groups) if settings.overlong_buffer else ():
            sample.parts["overlong"] = overlong_penalty(len(sample.ids), limit, settings.overlong_buffer)
            sample.reward += sample.parts["overlong"]
        return groups

    return take_spread(job, ask, number, settings.prompts_per_step, settings.dynamic_rounds, spread)


def credit(groups: Sequence[Group], settings: GrpoConfig) -> None:
    """Fills in the columns `advantages` and `weights` (of tokens, in the loss): one value a sample, for each token.

    The rows of one attempt have one advantage, by the reward of the last one, and are one answer wherever answers
    count.
    """
    g, tries = settings, [attempts(group) for group in groups]
    rewards = [[rows[-1].reward - sum(g.kl_coef * divergence(s, g.kl_form) for s in rows) for rows in t] for t in tries]
    exact = torch.tensor(rewards, dtype=torch.float64)  # fp32 would lose the differences of large rewards
    advantages = group_advantages(exact, g.normalize_std, g.baseline, g.std_of, g.std_eps)
    for rows, advantage in zip(chain.from_iterable(tries), advantages.flatten().tolist(), strict=True):
        written = max(1, sum(sample.written_tokens for sample in rows))
        for sample in rows:
            sample.columns["advantages"] = [advantage] * len(sample.ids)
            if g.aggregate == "sequences":
                sample.columns["weights"] = [1 / written] * len(sample.ids)


def divergence(sample: Sample, form: str) -> float:
    """Returns the estimated KL to the reference, in nats, summed over the tokens that the policy wrote; 0 where the
    reward does not hold it."""
    if "ref_logprobs" not in sample.columns:
        return 0.0
    log_ratio = torch.tensor(sample.columns["ref_logprobs"]) - torch.tensor(sample.logprobs)
    return float(masked_sum(KL_FORMS[form](log_ratio), torch.tensor(sample.trained)))


def learnable(groups: Sequence[Group]) -> list[Group]:
    """Returns the groups in which some token that the policy wrote has an advantage."""

    def learns(sample: Sample) -> bool:
        return any(a and trained for a, trained in zip(sample.columns["advantages"], sample.trained, strict=True))

    return [group for group in groups if any(map(learns, group))]


def update(
    job: Job, groups: Sequence[Group], number: int, reference: Scorer | None, replay: Replay, gate: Gate
) -> dict[str, float]:
    """Makes `grpo.epochs` x `grpo.minibatches` optimizer steps on one set of rollouts. Returns the means of their
    metrics.

    Groups whose rewards are all equal have no advantage and are left out, but they count in the denominator: the
    gradient is the mean over all of `groups`. Where that leaves fewer updates, the learning rate follows the steps all
    the same.
    """
    settings, total = job.config.grpo, updates_per_step(job.config)
    denominator = torch.tensor([divided_by(groups, job.config) / settings.minibatches], device=job.mesh.device)
    parts = split_groups(learnable(groups), settings.minibatches)
    if mismatch_of(job.config, "grpo").form != "off":
        score_old(job, parts, settings.epochs)
    minibatches = lay_out(job, parts, reference, fixed_width=replay.seqs > 0)
    if not parts:
        lr = learning_rate(number * total, job.config.optim, job.config.train.steps * total)
        return {"loss": 0.0, "grad_norm": 0.0, "lr": lr}
    gate.before_update(job.engine, minibatches[0], number)
    steps = []
    for epoch in range(settings.epochs):
        for i, (part, batches) in enumerate(zip(parts, minibatches, strict=True)):
            turn = number * total + epoch * settings.minibatches + i
            loss = averaged(loss_of(job.config), denominator, part)
            mixed, loss = replay.mix(turn, batches, loss, denominator)
            note_padding(job, mixed)
            steps.append(job.engine.train_step(mixed, loss, denominator, turn).numbers())
    gate.after_update(steps[0]["logprob_gap_max"], number)
    return mean_metrics(steps)


def lay_out(
    job: Job, parts: Sequence[Sequence[Group]], reference: Scorer | None, fixed_width: bool
) -> list[list[Batch]]:
    """Returns this rank's microbatches of each minibatch, with the columns that the loss reads."""
    names = ("advantages", "weights", OLD)
    minibatches = [group_microbatches(job, part, columns_of(part, names), fixed_width, policy=True) for part in parts]
    if job.config.grpo.kl_in == "loss":
        for batches in minibatches:
            add_reference(batches, reference)
    return minibatches


def divided_by(groups: Sequence[Group], config: Config) -> float:
    """Returns what `grpo.aggregate` divides the sum over all these groups by."""
    answers = sum(len(attempts(group)) for group in groups)
    match config.grpo.aggregate:
        case "sequences":
            return answers
        case "constant":
            return answers * config.rollout.max_new_tokens
        case _:
            return policy_tokens(groups)


def loss_of(config: Config) -> LossFn:
    """Returns the loss that the section asks for."""
    g = config.grpo
    objective = {
        "clip": partial(clipped, low=g.clip_low, high=g.clip_high, dual=g.dual_clip),
        "gspo": partial(clipped_by_sequence, low=g.clip_low, high=g.clip_high),
        "cispo": partial(capped, cap=g.ratio_cap),
    }[g.objective]
    return partial(
        policy_loss,
        objective=objective,
        kl_coef=g.kl_coef if g.kl_in == "loss" else 0.0,
        kl_form=g.kl_form,
        correction=correction_of(*mismatch_of(config, "grpo")),
        off_policy_delta=g.off_policy_delta,
    )


def summary(groups: Sequence[Group], sampled: Sequence[Group], settings: GrpoConfig) -> dict[str, float]:
    """Returns the metrics that the rollouts alone give, of all that was `sampled`; `kl` where the reward holds it."""
    charged = [divergence(s, settings.kl_form) for s in chain.from_iterable(groups) if "ref_logprobs" in s.columns]
    return {
        **rollout_metrics(sampled),
        "kept_fraction": sum(map(len, learnable(groups))) / sum(map(len, sampled)),
        "rounds": len(sampled) / settings.prompts_per_step,
        **({"kl": sum(charged) / policy_tokens(groups)} if charged else {}),
    }
