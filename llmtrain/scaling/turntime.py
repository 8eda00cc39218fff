"""Estimates how long a step takes whose models take turns, and what it sends: sampling, scoring, updating, new weights,
one after the other.

    step = sampling + forwards without gradients + epochs x minibatches updates + joining the weights

Sampling ahead goes on beside all others: the step is then the longer of the two.

Lengths are the longest there can be: every completion has `rollout.max_new_tokens` behind a prompt that fills the rest
of a row, and every pair fills a row, so that each sample or pair is a row of `train.seq_len` tokens. Real steps are
shorter. Sampling is timed by `scaling.sampler`, everything else as a training step is, `scaling.steptime`. Rewards,
moves to and from host memory, new weights on their way to a server or to processes that sample ahead, and text that is
mixed in (`data.replay_seqs`) are left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llmtrain.config.plan import HardwareConfig
from llmtrain.config.recipes import Recipe
from llmtrain.config.schema import Config, ModelConfig, ParallelConfig
from llmtrain.scaling.communication import Item, RankStep, Step, communication, evenly_loaded
from llmtrain.scaling.forwards import broadcast_bytes, frozen_rank, scoring, weight_sync
from llmtrain.scaling.links import bandwidths, link_seconds, ring_bandwidth
from llmtrain.scaling.memory import rank_states
from llmtrain.scaling.plan import Plan, ahead_workers, bubble_of, by_axes, rollout_workers
from llmtrain.scaling.sampler import Sampler, sampler_in_step
from llmtrain.scaling.simulate import forward_bubble
from llmtrain.scaling.steptime import StepTime, score_time, slowest_rank, step_time, summed
from llmtrain.scaling.turns import Models, parallel_of
from llmtrain.scaling.work import work_of

MICROBATCH_TOKENS = 16  # by which `data.microbatches` prefers fewer microbatches
JOB = "all ranks"  # the axis of what trainers send to rollout workers


@dataclass(frozen=True)
class Job:
    """Holds what the turns of a step are computed from. `model` is resolved, `parallel.dp_shard` is not -1."""

    config: Config
    recipe: Recipe
    model: ModelConfig
    models: Models
    p: Plan

    @property
    def parallel(self) -> ParallelConfig:
        return self.config.parallel.model_copy(update=self.p.mesh)

    @property
    def sampler(self) -> Sampler | None:
        """Returns what samples on a rank that does; None where nothing is sampled."""
        return sampler_in_step(self.config, self.model, self.recipe, self.p.sampling_ranks, self.p.hardware)

    @property
    def ahead(self) -> bool:
        """Tells whether processes beside the job sample."""
        return ahead_workers(self.config, self.recipe) > 0

    @property
    def updates(self) -> int:
        """Returns the updates of a step."""
        passes = self.recipe.passes_of(self.config)
        return passes.epochs * passes.minibatches

    @property
    def tokens(self) -> int:
        """Returns the most tokens that an epoch trains on, prompts included."""
        return self.recipe.passes_of(self.config).seqs * self.config.train.seq_len


@dataclass(frozen=True)
class Pass:
    """Describes what a model does in a step: `times` forwards without gradients, or updates, of the rows of `step`."""

    model: ModelConfig
    step: Step
    times: float
    trained: bool
    frozen: bool = False

    def rank(self, job: Job, pp_rank: int) -> RankStep:
        """Returns the place and work of a pipeline rank."""
        parallel = parallel_of(self.model, job.model, job.parallel)
        rank = evenly_loaded(RankStep(self.model, parallel, job.config.engine, self.step, pp_rank))
        return frozen_rank(rank) if self.frozen else rank

    def items(self, job: Job, pp_rank: int) -> list[Item]:
        """Returns the messages of one of the `times`. A frozen model is sharded over the copies of trained ones too."""
        rank = self.rank(job, pp_rank)
        if self.trained:
            return communication(rank)
        wider = {"shard": "grad", "expert_shard": "expert_grad"} if self.frozen else {}
        return [item._replace(axis=wider.get(item.axis, item.axis)) for item in scoring(rank)]


@dataclass(frozen=True)
class StepOfTurns:
    """Holds what the turns of a step send and how long they take, at full lengths."""

    update: Step  # of one update of the policy, on a rank
    updates: int
    sent_bytes: dict[str, dict[str, int]]  # by turn and mesh axes, of the busiest pipeline rank of that turn
    bubble: float  # of the policy's updates
    scoring_bubble: float | None  # None without a forward that scores
    seconds: dict[str, float]  # by turn; empty without hardware
    parts: dict[str, StepTime]  # of scoring and updating, without hardware none
    trained_flops: float  # the models' own, of all updates of a step
    ahead: bool  # sampling goes on beside the other turns

    @property
    def total_s(self) -> float:
        return step_seconds(self.seconds, self.ahead)


def step_seconds(seconds: dict[str, float], ahead: bool) -> float:
    """Returns the seconds of a step from those of its turns; `ahead`: it samples beside the others."""
    whole = sum(seconds.values())
    sampling = seconds.get("sampling", 0.0)
    return max(sampling, whole - sampling) if ahead else whole


def step_of_turns(job: Job) -> StepOfTurns:
    """Returns what a step sends and takes. Raises ValueError where ranks send over links that are not known."""
    scorers, trained = list(scorers_of(job)), list(trained_of(job))
    sent = {"scoring": _sent(job, scorers), "updating": _sent(job, trained), "new weights": _sync_sent(job)}
    seconds, parts = ({}, {}) if job.p.hardware is None else turn_seconds(job, job.p.hardware)
    work = sum(work_of(each.model, job.config.train.seq_len, job.config.engine).model for each in trained)
    return StepOfTurns(
        update=trained[0].step,
        updates=job.updates,
        sent_bytes={turn: axes for turn, axes in sent.items() if axes},
        bubble=_update_bubble(job, trained[0]),
        scoring_bubble=max((_scoring_bubble(job, each) for each in scorers), default=None),
        seconds=seconds,
        parts=parts,
        trained_flops=job.recipe.passes_of(job.config).epochs * job.tokens * work,
        ahead=job.ahead,
    )


def turn_seconds(job: Job, hardware: HardwareConfig) -> tuple[dict[str, float], dict[str, StepTime]]:
    """Returns the seconds of each turn of a step, in their order, and what those of scoring and updating are spent
    on."""
    parts = {}
    for name, passes in (("scoring", list(scorers_of(job))), ("updating", list(trained_of(job)))):
        if passes:
            parts[name] = summed([pass_time(job, each, hardware) for each in passes], [p.times for p in passes])
    seconds = {name: time.total_s for name, time in parts.items()}
    if (sampler := job.sampler) is not None:
        seconds = {"sampling": sampler.seconds(hardware), **seconds, "new weights": sync_seconds(job, hardware)}
    return seconds, parts


def scorers_of(job: Job) -> Iterator[Pass]:
    """Yields the forwards without gradients of a step, over all rows that an epoch trains on."""
    passes = job.recipe.passes_of(job.config)
    step = step_of_rows(job, passes.seqs)
    groups = (([job.model], passes.policy, False), (job.models.frozen, passes.frozen, True))
    for models, times, frozen in (*groups, (job.models.critics, passes.critics, False)):
        yield from (Pass(each, step, times, trained=False, frozen=frozen) for each in models if times)


def trained_of(job: Job) -> Iterator[Pass]:
    """Yields the updates of a step: of the policy, then of the critics."""
    passes = job.recipe.passes_of(job.config)
    step = step_of_rows(job, math.ceil(passes.seqs / passes.minibatches))
    yield from (Pass(each, step, job.updates, trained=True) for each in (job.model, *job.models.critics))


def step_of_rows(job: Job, rows: int) -> Step:
    """Returns the microbatches of a rank for so many full rows of all ranks, in the shape that `data.microbatches`
    takes: the one with fewest rows to compute, then with fewest microbatches."""
    train, p = job.config.train, job.parallel
    dp, tokens = p.dp_replicate * p.dp_shard, train.seq_len
    most = max(1, (train.micro_batch_tokens or train.micro_batch_seqs * tokens) // tokens)
    if job.recipe.fixed_batch and train.micro_batch_tokens is None:
        shapes = [(math.ceil(rows / (most * dp)), most)]
    else:
        shapes = [(max(p.pp, math.ceil(rows / (each * dp))), each) for each in range(1, most + 1)]
    count, each = min(shapes, key=lambda shape: shape[0] * (shape[1] * tokens + MICROBATCH_TOKENS))
    labels = min(job.recipe.step_size(job.config).sample_tokens, tokens) if job.recipe.samples else tokens
    ids = 2 if job.recipe.branches else int(job.config.data.mask_documents)
    return Step(count, each, tokens, math.ceil(rows / dp) * labels // p.cp, ids)


def pass_time(job: Job, each: Pass, hardware: HardwareConfig) -> StepTime:
    """Returns the time of one update, or of one forward over all rows."""
    rank, engine = each.rank(job, 0), job.config.engine
    if each.trained:
        states = max(rank_states(job.config, each.model, rank.parallel, each.step.microbatches), key=sum)
        bubble = _update_bubble(job, each)
        return step_time(each.model, rank.parallel, engine, each.step, states, bubble, hardware)
    rank = each.rank(job, slowest_rank(each.model, rank.parallel, each.step, engine))
    gathers = rank.engine.reshard if rank.engine.backend == "fsdp" else rank.engine.zero_stage == 3
    return score_time(rank, scoring(rank), _scoring_bubble(job, each), hardware, gathers)


def sync_seconds(job: Job, hardware: HardwareConfig) -> float:
    """Returns the seconds until the generator has the new weights: joined on every trainer, and with rollout workers
    broadcast over the job, tensor by tensor, one behind the other."""
    ranks = _policy_ranks(job)
    joined = max(sum(link_seconds(item, rank, hardware) for item in weight_sync(rank)) for rank in ranks)
    if not rollout_workers(job.config, job.recipe):
        return joined
    one_node, near = job.p.ranks <= hardware.gpus_per_node, min(job.p.ranks, hardware.gpus_per_node)
    node, network = bandwidths(hardware, near > 1, not one_node)
    return joined + broadcast_bytes(ranks[0]) / ring_bandwidth(node, network, near, one_node)


def _policy_ranks(job: Job) -> list[RankStep]:
    step = step_of_rows(job, 1)
    return [RankStep(job.model, job.parallel, job.config.engine, step, rank) for rank in range(job.parallel.pp)]


def _update_bubble(job: Job, each: Pass) -> float:
    parallel = parallel_of(each.model, job.model, job.parallel)
    work = work_of(each.model, job.config.train.seq_len, job.config.engine)
    return bubble_of(each.model, parallel, work, each.step.microbatches)


def _scoring_bubble(job: Job, each: Pass) -> float:
    parallel = parallel_of(each.model, job.model, job.parallel)
    work = work_of(each.model, job.config.train.seq_len, job.config.engine)
    return forward_bubble(each.model, parallel, work, each.step.microbatches) if parallel.pp > 1 else 0.0


def _sent(job: Job, passes: Sequence[Pass]) -> dict[str, int]:
    """Returns what the busiest pipeline rank moves in these passes, by mesh axes."""

    def of(pp_rank: int) -> dict[str, int]:
        each = [(item, one.times) for one in passes for item in one.items(job, pp_rank)]
        return by_axes([item._replace(size_bytes=int(item.size_bytes * times)) for item, times in each], job.parallel)

    return max((of(rank) for rank in range(job.parallel.pp)), key=lambda sent: sum(sent.values()))


def _sync_sent(job: Job) -> dict[str, int]:
    """Returns what new weights move, by mesh axes; nothing where nothing is sampled."""
    if job.sampler is None:
        return {}
    ranks = _policy_ranks(job)
    sent = max((by_axes(weight_sync(rank), job.parallel) for rank in ranks), key=lambda each: sum(each.values()))
    return sent | ({JOB: broadcast_bytes(ranks[0])} if rollout_workers(job.config, job.recipe) else {})
