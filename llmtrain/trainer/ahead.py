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
    """Returns the source, whose workers start now; `first` is the number of the first prompt that the run wants."""
    r, seed, dtype = job.config.rollout, job.config.seed, compute_dtype(job.config.engine.precision)
    settings = [settings_of(job, dtype, worker) for worker in range(r.workers)]
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


def settings_of(job: Job, dtype: torch.dtype, worker: int) -> dict[str, Any]:
    """Returns what a worker is built from, as JSON."""
    return {
        "kind": "settings",
        "model": without_adapters(job.model).model_dump(mode="json"),
        "dtype": str(dtype).removeprefix("torch."),
        "device": device_of(job, worker),
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


def device_of(job: Job, worker: int) -> str:
    """Returns the device of a worker: the GPUs behind those of the trainers, in turn with these where none is left."""
    if job.mesh.device.type != "cuda":
        return str(job.mesh.device)
    return f"cuda:{(job.mesh.size + worker) % torch.cuda.device_count()}"
