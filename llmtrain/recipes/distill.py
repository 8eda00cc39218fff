"""Implements distillation (GKD, arXiv 2306.13649): answers, given or sampled by the student -> candidates -> what
teachers say of them -> divergence -> step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from llmtrain.config.recipes.distill import RECIPE, DistillConfig
from llmtrain.config.schema import Config
from llmtrain.config.served import token_of
from llmtrain.data.faults import Faults
from llmtrain.data.packing import Demonstrations
from llmtrain.data.prompts import PromptSet
from llmtrain.data.rows import Record
from llmtrain.engine.base import LossFn, Scorer
from llmtrain.losses.distill import (
    Divergence,
    distillation_loss,
    forward_kl,
    jensen_shannon,
    largest_gap,
    likeliest_of,
    reverse_kl,
    sampled_loss,
)
from llmtrain.parallel.mesh import shutdown
from llmtrain.rollout.served import ServedModel
from llmtrain.trainer.batches import count_trained, demonstration_microbatches, group_microbatches, held_out_loss
from llmtrain.trainer.frozen import awake, build_scorer
from llmtrain.trainer.gate import Gate
from llmtrain.trainer.job import Job, join, set_epochs
from llmtrain.trainer.loop import train
from llmtrain.trainer.record import Clock, SampleLog, is_due, note_evaluation
from llmtrain.trainer.replay import Replay
from llmtrain.trainer.rollouts import build_source, closing, read_prompts, rollout_metrics, serve_rollouts
from llmtrain.trainer.served import ask_samples, check_served
from llmtrain.trainer.waste import note_padding
from llmtrain.trainer.weights import build_engine
from llmtrain.types import Batch, Group, Metrics, Sample, Scores


def main(config: Config) -> None:
    """Runs `llmtrain distill` on this rank."""
    job = join(config, RECIPE.of(config))
    if job.mesh.role == "rollout":
        serve_rollouts(job)
    elif config.distill.on_policy:
        on_own_samples(job)
    else:
        on_given_rows(job)
    shutdown()


def on_given_rows(job: Job) -> None:
    """Trains on answers that are given: divergences at each of their tokens."""
    rows = demonstrations(job, job.config.data.train)
    held_out = demonstrations(job, job.config.data.held_out) if job.config.train.eval_every_steps else None
    set_epochs(job, len(rows))
    settings, mesh = job.config.train, job.mesh
    replay = Replay(job)
    build_engine(job, settings.steps)
    teachers, loss = build_teachers(job), loss_of(job)

    def evaluate() -> None:
        if held_out is not None:
            scores = held_out_loss(job.engine, held_out, settings.eval_seqs, settings.micro_batch_seqs, mesh)
            note_evaluation(job, scores)

    def step(number: int) -> tuple[dict[str, float], int]:
        if number == 0 or is_due(number, settings.eval_every_steps):
            evaluate()
        turn = number + job.guard.skipped_steps(number)
        batches = demonstration_microbatches(job, rows, turn, fixed_width=replay.seqs > 0)
        batches = [replace(batch, temperature=job.config.distill.temperature) for batch in batches]
        trained = count_trained(batches, mesh)
        consult(job, teachers, batches)
        mixed, mixed_loss = replay.mix(turn, batches, loss, trained)
        note_padding(job, mixed)
        stats = job.engine.train_step(mixed, mixed_loss, trained)
        return stats.numbers(), (settings.global_batch_seqs + replay.seqs) * settings.seq_len

    train(job, step)
    evaluate()


def on_own_samples(job: Job) -> None:
    """Trains on answers that the student samples with its newest weights: one update a step."""
    config, settings = job.config, job.config.distill
    prompts = read_prompts(job)
    check_prompts(settings, config.data.train, prompts)
    replay = Replay(job)
    servers = find_servers(job, prompts)
    build_engine(job, config.train.steps)
    teachers, loss = build_teachers(job), with_gap(loss_of(job))
    source = build_source(job, prompts, settings.prompts_per_step)
    gate = Gate(config.rollout, config.engine.precision, job.mesh)
    samples = SampleLog(job)

    def step(number: int) -> tuple[dict[str, float], int]:
        clock = Clock()
        groups = source.take(number)
        times = {"rollout_s": clock.lap()}
        columns = [*credit(settings, groups), *ask(job, servers, groups)]
        times |= {"server_s": clock.lap()} if servers else {}
        batches = group_microbatches(job, groups, columns, fixed_width=replay.seqs > 0)
        trained = count_trained(batches, job.mesh)
        gate.before_update(job.engine, batches, number)
        consult(job, teachers, batches)
        mixed, mixed_loss = replay.mix(number, batches, loss, trained)
        note_padding(job, mixed)
        metrics = job.engine.train_step(mixed, mixed_loss, trained).numbers()
        gate.after_update(metrics["logprob_gap_max"], number)
        times["train_s"] = clock.lap()
        source.publish(job.engine.full_weights(), number + 1)
        samples.write(number + 1, groups)
        times["sync_s"] = clock.lap()
        tokens = sum(len(sample.ids) for sample in chain.from_iterable(groups))
        return {**summary(groups), **metrics, **times, "weight_version": number + 1}, tokens

    with closing(source):
        source.publish(job.engine.full_weights(), job.step)
        train(job, step)


def consult(job: Job, teachers: Mapping[int, Scorer], batches: Sequence[Batch]) -> None:
    """Adds to the batches, in place, the candidates of each position, and what every teacher says of them.

    The candidates are the whole vocabulary, or the likeliest tokens of the distribution that the divergence is a mean
    over: the student's for the reverse KL, else the teachers'. With `estimate: sampled` the labels are all there is.
    """
    settings, vocabulary = job.config.distill, job.model.vocab_size
    with awake(list(teachers.values()), settings.teachers_wait):
        if settings.estimate == "sampled":
            return note(batches, {i: [s.logprobs for s in each.score(batches)] for i, each in teachers.items()})
        if 0 < settings.top_k < vocabulary:
            asked = [replace(batch, top_k=settings.top_k) for batch in batches]
            proposers = [job.engine] if settings.kind == "reverse" else teachers.values()
            proposals = [model.score(asked) for model in proposers]
            propose(batches, proposals)
            if len(teachers) == 1 and settings.kind != "reverse":  # it has said all there is to say
                return note(batches, {0: [s.candidates for s in proposals[0]]})
        else:
            for batch in batches:
                batch.candidates = torch.arange(vocabulary).expand(*batch.labels.shape, vocabulary)
        note(batches, {i: [s.candidates for s in each.score(batches)] for i, each in teachers.items()})


def propose(batches: Sequence[Batch], proposals: Sequence[Sequence[Scores]]) -> None:
    """Adds the candidates to the batches, in place, from the scores of each proposer: [proposers][batches]."""
    for batch, *each in zip(batches, *proposals, strict=True):
        shares = [batch.extra[f"share_{i}"].to(each[0].candidates.device) for i in range(len(each))]
        batch.candidates = likeliest_of(each, shares).cpu()


def note(batches: Sequence[Batch], said: Mapping[int, Sequence[Tensor | None]]) -> None:
    """Adds the log-probs of each teacher, by its number, to the batches, in place: [teachers][batches]."""
    for i, teacher in said.items():
        for batch, logprobs in zip(batches, teacher, strict=True):
            batch.extra[f"teacher_{i}"] = logprobs.cpu()


def loss_of(job: Job) -> LossFn:
    """Returns the loss that the section asks for."""
    settings = job.config.distill
    teachers = len(settings.teacher)
    if settings.estimate == "sampled":
        return partial(sampled_loss, teachers=teachers)
    divergences: dict[str, Divergence] = {
        "forward": forward_kl,
        "reverse": reverse_kl,
        "jsd": partial(jensen_shannon, beta=settings.beta),
    }
    whole = not 0 < settings.top_k < job.model.vocab_size
    return partial(distillation_loss, divergence=divergences[settings.kind], teachers=teachers, whole=whole)


def with_gap(loss: LossFn) -> LossFn:
    """Returns the loss with `logprob_gap_max`, by which the gate compares generator and trainer."""

    def compared(scores: Scores, batch: Batch) -> tuple[Tensor, Metrics]:
        value, metrics = loss(scores, batch)
        return value, {**metrics, "logprob_gap_max": largest_gap(scores, batch)}

    return compared


def build_teachers(job: Job) -> dict[int, Scorer]:
    """Returns the teachers whose weights are here, by their number, frozen, in host memory if they wait there."""
    settings = job.config.distill
    here = {i: each for i, each in enumerate(settings.teacher) if not each.served}
    teachers = {i: build_scorer(job, f"distill.teacher.{each.name}", each.path) for i, each in here.items()}
    for teacher in teachers.values() if settings.teachers_wait else ():
        teacher.to_host()
    return teachers


def find_servers(job: Job, prompts: PromptSet) -> dict[int, ServedModel]:
    """Returns the teachers behind servers, by their number; each has shown that it can answer."""
    d, servers = job.config.distill, {}
    for i, each in ((i, each) for i, each in enumerate(d.teacher) if each.served):
        servers[i] = ServedModel(each.path, each.model, token_of(each.token_env), d.server_threads, d.server_deadline_s)
        check_served(job, f"distill.teacher.{each.name}", servers[i], prompts)
    return servers


def ask(job: Job, servers: Mapping[int, ServedModel], groups: Sequence[Group]) -> list[str]:
    """Fills in what each server says of the samples that its teacher has a share in. Returns the columns' names."""
    for i, server in servers.items():
        ask_samples(job.mesh, server, groups, f"teacher_{i}", partial(has_share, i))
    return [f"teacher_{i}" for i in servers]


def has_share(number: int, sample: Sample) -> bool:
    """Tells whether the teacher of this number counts in the loss of a sample."""
    return sample.columns[f"share_{number}"][0] > 0


def demonstrations(job: Job, path: str) -> Demonstrations:
    """Returns the rows of a file of demonstrations, as the data section says, with the share of each teacher."""
    config, columns = job.config, partial(shares_of, job.config.distill)
    seq_len, pack = config.train.seq_len, config.data.pack
    return Demonstrations(path, job.tokenizer, seq_len, config.seed, pack, config.data, columns)


def shares_of(settings: DistillConfig, record: Record) -> dict[str, float]:
    """Returns the share of each teacher in the loss of a row, by column: all of it for the one that the row names in
    its field `teacher`, else by their weights. Raises ValueError, without a place, when there is none of that name."""
    names, chosen = [each.name for each in settings.teacher], record.get("teacher")
    if chosen is not None and chosen not in names:
        raise ValueError(f"teacher={chosen!r}: must be one of {', '.join(names)} (distill.teacher); correct it")
    weights = [each.weight if chosen in (None, each.name) else 0.0 for each in settings.teacher]
    return {f"share_{i}": weight / sum(weights) for i, weight in enumerate(weights)}


def check_prompts(settings: DistillConfig, path: str, prompts: PromptSet) -> None:
    """Raises ValueError, with the line of each, when prompts name teachers that are not there."""
    faults = Faults(path)
    for where, record in zip(prompts.places, prompts.examples, strict=True):
        try:
            shares_of(settings, record)
        except ValueError as error:
            faults.add(where, str(error))
    faults.raise_any()


def credit(settings: DistillConfig, groups: Sequence[Group]) -> tuple[str, ...]:
    """Fills in the share of each teacher, one value a sample for each of its tokens. Returns the columns' names."""
    for sample in chain.from_iterable(groups):
        shares = shares_of(settings, sample.example)
        sample.columns = {name: [share] * len(sample.ids) for name, share in shares.items()}
    return tuple(f"share_{i}" for i in range(len(settings.teacher)))


def summary(groups: Sequence[Group]) -> dict[str, float]:
    """Returns the metrics that the samples alone give; those of rewards only where some are named."""
    found = rollout_metrics(groups)
    unjudged = () if groups[0][0].parts else ("reward_mean", "reward_errors")
    return {name: value for name, value in found.items() if name not in unjudged}
