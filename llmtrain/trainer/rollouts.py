"""Builds the generator and the source of rollouts that the `rollout` section describes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain

import torch

from llmtrain.arch.adapters import without_adapters
from llmtrain.config.schema import Config
from llmtrain.data.prompts import PromptSet
from llmtrain.engine.precision import compute_dtype
from llmtrain.envs.parts import add_parts, failures_of, judged_by_environment
from llmtrain.model.decoder import Decoder
from llmtrain.parallel.mesh import Mesh
from llmtrain.rewards import RewardsFail, build_reward, check_rows, count_failures, reward_metrics, stop_if_failing
from llmtrain.rollout.ahead import Ahead
from llmtrain.rollout.board import WorkersFail
from llmtrain.rollout.generator import Generator, RolloutSource
from llmtrain.rollout.native import NativeGenerator
from llmtrain.rollout.source import InStep, Shuffled, shared_reward
from llmtrain.rollout.vllm import VllmGenerator
from llmtrain.rollout.worker import Answer, ColocatedGenerator, RemoteGenerator, serve
from llmtrain.trainer.ahead import build_ahead
from llmtrain.trainer.completions import completion_text, sampling_of, stop_text
from llmtrain.trainer.curriculum import Curriculum
from llmtrain.trainer.environments import answering, prompts_of, with_agent
from llmtrain.trainer.gate import Disagreement
from llmtrain.trainer.job import Job
from llmtrain.trainer.record import CURRICULUM, STEP_SAMPLES
from llmtrain.trainer.recorded import Recording, Replayed, made_with
from llmtrain.trainer.verify import load_verified
from llmtrain.types import Group, Prompt, Sample, Sampling, attempts

PROMPTS = "prompts"  # key in Job.state: how many the run has sampled


def local_generator(job: Job) -> Generator:
    """Returns a generator with a whole model on this rank; its weights come with the first sync."""
    r, shape, device = job.config.rollout, without_adapters(job.model), job.mesh.device
    dtype, most, decode = compute_dtype(job.config.engine.precision), job.config.train.seq_len, stop_text(job.tokenizer)
    if r.generator == "vllm":
        return VllmGenerator(shape, r, dtype, device, most, decode, record_experts=r.router_replay)
    with torch.device("meta"):
        model = Decoder(shape)
    model = model.to(dtype).to_empty(device=device)
    if job.model.tie_embeddings:
        model.head.weight = model.embed.weight
    return NativeGenerator(model, r.max_batch_seqs, device, most, decode, record_experts=r.router_replay)


def build_generator(job: Job) -> ColocatedGenerator | RemoteGenerator:
    """Returns the trainers' generator, local or behind the link, as `rollout.placement` says."""
    if job.config.rollout.placement == "separate":
        job.mesh.link.await_trainers("model", job.mesh.role)
        return RemoteGenerator(job.mesh.link, job.mesh.num_trainers)
    local = with_agent(job.config, job.tokenizer, local_generator(job))
    answer = answering(job.config, job.tokenizer, local).generate
    return ColocatedGenerator(local, job.mesh, partial(answered_by_all, job.mesh, answer))


def answered_by_all(mesh: Mesh, answer: Answer, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
    """Returns what `answer` does on this rank (a collective). Where it fails on any, all raise at once: they would wait
    for its share of the prompts."""
    groups, error = [], None
    try:
        groups = answer(prompts, sampling)
    except Exception as failed:  # of any kind, as the others must hear of it
        error = failed
    told = mesh.all_gather_json(None if error is None else [type(error).__name__, str(error)])
    if error is not None:
        raise error
    for rank, (kind, reason) in ((rank, each) for rank, each in enumerate(told) if each is not None):
        raise FloatingPointError(reason) if kind == "FloatingPointError" else OSError(f"rank {rank}: {reason}")
    return groups


def serve_rollouts(job: Job) -> None:
    """Runs a rollout rank from its start to its end."""
    generator = with_agent(job.config, job.tokenizer, local_generator(job))
    job.mesh.link.await_trainers("model", job.mesh.role)
    answer = answering(job.config, job.tokenizer, generator).generate
    serve(job.mesh.link, generator, job.mesh.rank, job.mesh.size, answer)


def build_source(job: Job, prompts: PromptSet, prompts_per_step: int) -> RolloutSource:
    """Returns the source that a recipe takes its groups from, as the sections `rollout` and `rewards` say."""
    config, r = job.config, job.config.rollout
    if r.replay is not None:
        order = curriculum(job, prompts, prompts_per_step) or Shuffled(prompts, config.seed)
        return Replayed(job.mesh, r.replay, prompts, prompts_per_step, order, made_with(config, job.contents))
    source = sampling_source(job, prompts, prompts_per_step)
    job.report = source.report
    if not r.record:
        return source
    return Recording(source, job.mesh, records_dir(config), prompts_per_step, made_with(config, job.contents))


def records_dir(config: Config) -> str:
    """Returns the directory that `rollout.record` writes to."""
    return os.path.join(config.directory, "rollouts")


def sampling_source(job: Job, prompts: PromptSet, prompts_per_step: int) -> InStep | Ahead:
    """Returns the source that samples, in step or ahead."""
    config, environment = job.config, job.config.rollout.environment or job.config.rollout.agent
    shared = shared_reward(build_reward(config.rewards, completion_text(config, job.tokenizer)), job.mesh)

    def reward(groups: Sequence[Group]) -> None:
        last = last_rows(groups)
        judged = judged_by_environment(last)
        shared(last)
        rewards = [*config.rewards, *add_parts(last, judged, environment)]
        count_failures(rewards, last)  # here, where every rank has all groups
        spread_rewards(groups)
        stop_if_failing([*rewards, *failures_of(environment)], [s.errors for group in last for s in group])

    if config.rollout.max_staleness:
        job.ahead = build_ahead(job, prompts, prompts_per_step, first_prompt(job, job.step, prompts_per_step), reward)
        return job.ahead
    job.generator, sampling = build_generator(job), sampling_of(config, job.tokenizer)
    order = curriculum(job, prompts, prompts_per_step)
    load = partial(load_verified, job)
    return InStep(job.generator, prompts, prompts_per_step, sampling, reward, config.seed, order, load)


def last_rows(groups: Sequence[Group]) -> list[Group]:
    """Returns the last row of each attempt of the groups: what is rewarded."""
    return [[rows[-1] for rows in attempts(group)] for group in groups]


def spread_rewards(groups: Sequence[Group]) -> None:
    """Gives the rows of each attempt the reward of its last one, with its parts and errors."""
    for *rows, last in chain.from_iterable(map(attempts, groups)):
        for row in rows:
            row.reward, row.parts, row.errors = last.reward, dict(last.parts), dict(last.errors)


def curriculum(job: Job, prompts: PromptSet, prompts_per_step: int) -> Curriculum | None:
    """Returns the order of prompts that `data.curriculum` asks for; its state lies in `job.state`."""
    settings, total = job.config.data.curriculum, job.config.train.steps * prompts_per_step
    if settings is None:
        return None
    return Curriculum(settings, prompts, total, job.config.seed, job.state.setdefault(CURRICULUM, {}))


def take_spread(
    job: Job,
    ask: Callable[[range], list[Group]],
    number: int,
    wanted: int,
    rounds: int,
    spread: Callable[[Group], bool],
) -> tuple[list[Group], list[Group]]:
    """Asks for `wanted` groups, and again until as many have a `spread`, in at most so many rounds. Returns the groups
    of the step, as many as `wanted`, and all that were sampled.

    Where too few have one, groups without fill up, so that what a step is divided by does not shrink. Each round takes
    the next prompts of the run; `job.state[PROMPTS]`, and so every checkpoint, holds how many were taken.
    """
    sampled: list[Group] = []
    for _ in range(rounds):
        first = first_prompt(job, number, wanted)
        sampled += ask(range(first, first + wanted))
        job.state[PROMPTS] = first + wanted
        if sum(map(spread, sampled)) >= wanted:
            break
    best = sorted(range(len(sampled)), key=lambda i: not spread(sampled[i]))[:wanted]  # stable: the first of each
    return [sampled[i] for i in sorted(best)], sampled


def first_prompt(job: Job, step: int, prompts_per_step: int) -> int:
    """Returns the number of the next prompt that a step takes."""
    return max(job.state.get(PROMPTS, 0), step * prompts_per_step)  # where all take as many nothing is counted


def read_prompts(job: Job) -> PromptSet:
    """Returns the prompts of `data.train`, each of which leaves room for `rollout.max_new_tokens` in a row.

    Starts the workers of the rewards. Raises ValueError for rows that cannot be rewarded.
    """
    config = job.config
    prompts = prompts_of(config, config.data.train, job.tokenizer)
    check_rows(config.rewards, prompts.examples, prompts.places)
    return prompts


def rollout_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Returns what metrics.jsonl says of samples: their rewards, lengths in tokens, and how many were finished. Rows of
    one attempt are one sample."""
    rows, last = list(chain.from_iterable(groups)), last_rows(groups)
    samples = list(chain.from_iterable(last))
    return {
        STEP_SAMPLES: len(samples),
        "reward_mean": sum(s.reward for s in samples) / len(samples),
        **reward_metrics(last),
        "response_tokens_mean": sum(s.written_tokens for s in rows) / len(samples),
        "finished_fraction": sum(s.finished for s in samples) / len(samples),
        **episode_metrics(rows, len(samples)),
    }


def episode_metrics(rows: Sequence[Sample], samples: int) -> dict[str, float]:
    """Returns the turns of the policy a sample, the tokens that it did not write, and where some samples have several
    the rows; nothing where it wrote all."""
    heard = sum(len(s.ids) - s.written_tokens for s in rows)
    turns = sum(written for s in rows for written, _ in s.turns()) if heard else 0
    means = {"turns_mean": turns / samples, "environment_tokens_mean": heard / samples}
    return means | ({"rows_mean": len(rows) / samples} if len(rows) > samples else {}) if heard else {}


@contextlib.contextmanager
def closing(source: RolloutSource) -> Iterator[None]:
    """Closes the source at the end, and after failures that all trainers meet together.

    Rollout workers are told by a collective: after a failure of one rank alone it would wait for the others.
    """
    try:
        yield
    except (SystemExit, FloatingPointError, Disagreement, RewardsFail, WorkersFail, OSError):
        source.close()
        raise
    source.close()
