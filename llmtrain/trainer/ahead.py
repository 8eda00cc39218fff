"""Builds the source that samples ahead of training, as the sections `rollout` and `parallel` say."""

from __future__ import annotations

import sys
from typing import Any

import torch

from llmtrain.arch.adapters import without_adapters
from llmtrain.config.schema import Config
from llmtrain.data.prompts import PromptSet
from llmtrain.engine.precision import compute_dtype
from llmtrain.rollout.ahead import Ahead
from llmtrain.rollout.board import Limits
from llmtrain.rollout.fleet import Orders
from llmtrain.rollout.process import Program
from llmtrain.rollout.source import numbered
from llmtrain.trainer.completions import sampling_of
from llmtrain.trainer.job import Job, tokenizer_dir
from llmtrain.types import Reward

COMMAND = (sys.executable, "-m", "llmtrain.rollout.worker_process")
PLAYING = (sys.executable, "-m", "llmtrain.envs.worker_process")  # episodes, or runs of an agent


def build_ahead(job: Job, prompts: PromptSet, prompts_per_step: int, first: int, reward: Reward) -> Ahead:
    """Returns the source, whose workers start now, on each machine its share; `first` is the number of the first prompt
    that the run wants (a collective)."""
    r, seed, dtype = job.config.rollout, job.config.seed, compute_dtype(job.config.engine.precision)
    settings = {worker: settings_of(job, dtype, device) for worker, device in own_workers(job).items()}
    limits = Limits(
        prompts_per_step,
        r.max_staleness,
        job.config.train.steps,
        at_once=r.prompts_at_once,
        patience_s=2 * r.deadline_s + 60,  # a worker that is waited for gives news, or fails, in the half of it
    )
    orders = Orders(
        Program(PLAYING if r.environment or r.agent else COMMAND, settings, job.config.directory, r.deadline_s),
        lambda numbers: numbered(prompts, seed, numbers, [prompts.at(number, seed) for number in numbers]),
        sampling_of(job.config, job.tokenizer),
        r.inflight,
        r.restarts,
        episodes=r.environment is not None,
        runs=r.agent is not None,
    )
    return Ahead(job.mesh, prompts, limits, orders, reward, seed, dtype, first, r.verify == "checksum")


def own_workers(job: Job) -> dict[int, str]:
    """Returns the device of each worker that this trainer keeps, by the worker's number (a collective): the machines
    get workers in turn, and the first trainer of each keeps them."""
    leaders, mesh = job.mesh.leaders(), job.mesh
    if mesh.rank not in leaders:
        return {}
    machine = leaders.index(mesh.rank)
    trainers = [*leaders[1:], mesh.size][machine] - mesh.rank
    own = range(machine, job.config.rollout.workers, len(leaders))
    return {worker: device_of(mesh.device, trainers + i) for i, worker in enumerate(own)}


def settings_of(job: Job, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Returns what a worker is built from, as JSON."""
    return {
        "kind": "settings",
        "model": without_adapters(job.model).model_dump(mode="json"),
        "dtype": str(dtype).removeprefix("torch."),
        "device": device,
        "rollout": job.config.rollout.model_dump(mode="json"),
        "max_seq_tokens": job.config.train.seq_len,
        "tokenizer": tokenizer_dir(job.config),
        **of_playing(job.config),
    }


def of_playing(config: Config) -> dict[str, Any]:
    """Returns what a worker that plays episodes, or runs of an agent, is told beside, as JSON."""
    t, r = config.tokenizer, config.rollout
    if r.environment is None and r.agent is None:
        return {}
    template = {"chat_template": t.chat_template, "chat_template_kwargs": t.chat_template_kwargs}
    return {**template, "rewarded": bool(config.rewards)}


def device_of(of_trainer: torch.device, place: int) -> str:
    """Returns the device of what is the trainers' neighbour at this place on their machine, from 0, counted on behind
    their own: a GPU of its own, in turn with theirs where none is left."""
    if of_trainer.type != "cuda":
        return str(of_trainer)
    return f"cuda:{place % torch.cuda.device_count()}"
