"""Defines a training job on one rank: what a recipe and the loop share, and how the ranks come together."""

from __future__ import annotations

import json
import math
import os
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from llmtrain.arch.generation import GENERATION, read_generation
from llmtrain.arch.resolve import resolve_model
from llmtrain.checkpoint.group import together
from llmtrain.checkpoint.roles import MAIN
from llmtrain.checkpoint.saver import Saver
from llmtrain.config.recipes import Recipe
from llmtrain.config.schema import Config, DataConfig, ModelConfig
from llmtrain.config.tasks import tasks_of
from llmtrain.data.ends import generation_settings
from llmtrain.data.prepare import prepare
from llmtrain.data.shards import verify_shards
from llmtrain.data.tokenizer import Tokenizer, load_tokenizer
from llmtrain.engine.base import Engine
from llmtrain.observe.contents import CACHE, Checksums
from llmtrain.observe.evaluations import is_evaluation, make_room
from llmtrain.observe.files import write_whole
from llmtrain.observe.locks import hold
from llmtrain.observe.log import log, make_run_dir
from llmtrain.parallel.mesh import Mesh, init_mesh
from llmtrain.parallel.watch import Watch
from llmtrain.rollout.ahead import Ahead
from llmtrain.rollout.generator import Generator
from llmtrain.trainer.identity import Contents, check_directory, check_files, contents_of, record_of


@dataclass
class Updates:
    """Holds what trainer.guard remembers of one model."""

    losses: list[float] = field(default_factory=list)  # those of the last updates, for spikes
    skips: int = 0  # updates left out in a row


@dataclass
class GuardState:
    """Holds what trainer.guard decides by; it is a part of every checkpoint."""

    updates: dict[str, Updates] = field(default_factory=dict)  # by role
    rewinds: list[list[int]] = field(default_factory=list)  # [back to step, steps, tokens skipped there] each

    @classmethod
    def of_checkpoint(cls, saved: dict) -> GuardState:
        """Returns the state that a checkpoint holds; earlier versions saved that of one model, without a role."""
        held = saved["updates"] if "updates" in saved else {MAIN: {key: saved[key] for key in ("losses", "skips")}}
        return cls({role: Updates(**each) for role, each in held.items()}, saved["rewinds"])

    def of(self, role: str) -> Updates:
        """Returns what is remembered of a role's updates."""
        return self.updates.setdefault(role, Updates())

    def skipped_steps(self, step: int) -> int:
        """Returns how many steps `step`, counted from 0, is ahead in the data because of rewinds."""
        return sum(steps for to_step, steps, _ in self.rewinds if to_step <= step)

    def skipped_tokens(self, step: int) -> int:
        """Returns how many tokens `step` is ahead in the data because of rewinds."""
        return sum(tokens for to_step, _, tokens in self.rewinds if to_step <= step)


@dataclass
class Job:
    """Holds what one rank knows of a training job: a stage of a run, or a command started by itself."""

    config: Config
    recipe: Recipe
    model: ModelConfig  # resolved
    mesh: Mesh
    tokenizer: Tokenizer
    watch: Watch
    engines: dict[str, Engine] = field(default_factory=dict)  # trained models by role; none on rollout workers
    step: int = 0  # finished steps of the stage
    tokens: int = 0  # seen in these steps
    guard: GuardState = field(default_factory=GuardState)
    state: dict[str, Any] = field(default_factory=dict)  # what the recipe carries from step to step, as JSON
    contents: Contents = field(default_factory=dict)  # of what this run reads
    base: str | None = None  # fingerprint of the weights that adapters are trained on
    saver: Saver | None = None  # made by the loop
    generator: Generator | None = None  # of a recipe that samples: has the weights that were published last
    ahead: Ahead | None = None  # of a recipe whose rollout workers sample while it trains
    report: Callable[[], dict[str, float]] = dict  # what the source of rollouts says of the step that ends
    padding: float = 0.0  # share of the tokens in this rank's last microbatches, see trainer.waste

    @property
    def engine(self) -> Engine:
        """Returns the engine of the main model: the only one of most recipes, and the one that is exported."""
        return self.engines[MAIN]

    def model_of(self, role: str) -> ModelConfig:
        """Returns the resolved model section of a trained role."""
        return self.model if role == MAIN else self.engines[role].parts[0].config


def join(config: Config, recipe: Recipe) -> Job:
    """Makes everything before the model: process groups, run directory, data and tokenizer."""
    seed_everything(config.seed)
    mesh = init_mesh(config.parallel, config.rollout if recipe.samples else None, config.engine.timeout_s)
    watch = Watch(config.engine.timeout_s)
    contents: Contents = {}
    if mesh.role == "trainer":
        log(mesh.table())
        contents = together(mesh, lambda: start_directory(config, recipe) if mesh.rank == 0 else None)[0]
    if mesh.role == "rollout":
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)  # the trainers save first, then they let the workers go
    if mesh.link is not None:
        mesh.link.await_trainers("data", mesh.role)
    tokenizer = open_tokenizer(config)
    model = resolve_model(config.model)
    if tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"model.vocab_size={model.vocab_size}: must be above {tokenizer.vocab_size - 1}, the largest token id of "
            f"{tokenizer_dir(config)}; raise it, or use the tokenizer that the model was trained with"
        )
    return Job(config, recipe, model, mesh, tokenizer, watch, contents=contents)


def set_epochs(job: Job, rows: int) -> None:
    """Sets `train.steps` to as many as `train.epochs` of this number of rows take, where epochs are given."""
    train = job.config.train
    if train.epochs is not None:
        steps = max(1, math.ceil(train.epochs * rows / train.global_batch_seqs))
        log(f"{train.epochs:g} epochs of {rows} rows, {train.global_batch_seqs} a step: {steps} steps")
        job.config = job.config.model_copy(update={"train": train.model_copy(update={"steps": steps})})


def seed_everything(seed: int) -> None:
    """Seeds Python, numpy and torch, the same on every rank."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def start_directory(config: Config, recipe: Recipe) -> Contents:
    """Takes the run directory for this process, and makes the data if this stage describes how; returns the contents of
    what the run reads. Raises ValueError when another job or another run has the directory."""
    make_run_dir(config.directory)
    if not is_evaluation(config.directory):  # which `make_room` moves first
        check_files(config.directory)  # before the lock is written there; the whole check needs it
    hold(config.directory)
    make_room(config.directory)
    checksums = Checksums(os.path.join(config.directory, CACHE))

    def contents() -> Contents:
        return contents_of(config, recipe, data_dir(config), tokenizer_dir(config), checksums)

    found = contents()
    check_directory(config.directory, record_of(resolved(config), recipe, found), recipe)
    if config.data.sources or config.data.tasks:
        prepare(with_tasks(config), config.tokenizer, data_dir(config), tokenizer_dir(config), config.seed)
        found = contents()
    if config.data.verify and not config.data.sources and (recipe.packs_text or config.data.replay_seqs):
        verify_shards(data_dir(config))  # `prepare` verifies those that it makes
    checksums.save()
    return found


def with_tasks(config: Config) -> DataConfig:
    """Returns the section `data`, whose cleaning looks for the problems of `eval.tasks` too, those in files.

    Raises ConfigError when a task file is faulty.
    """
    data = config.data
    if not data.collect or data.clean.contamination is None:
        return data
    places = {
        f"eval-{task.label}": task.data.place for task in tasks_of(config.eval.tasks) if task.data and task.data.path
    }
    own = data.clean.contamination.sets
    sets = own | {name: place for name, place in places.items() if name not in own and place not in own.values()}
    contamination = data.clean.contamination.model_copy(update={"sets": sets})
    return data.model_copy(update={"clean": data.clean.model_copy(update={"contamination": contamination})})


def keep_generation(config: Config) -> None:
    """Writes how the model generates that the run starts from into the run directory, for what is made of the run."""
    start = config.model.init_from
    if start and read_generation(start):
        settings = generation_settings(load_tokenizer(tokenizer_dir(config)), (start,))
        write_whole(os.path.join(config.directory, GENERATION), json.dumps(settings, indent=2) + "\n")


def resolved(config: Config) -> Config:
    """Returns the configuration with the shape of the model written out."""
    return config.model_copy(update={"model": resolve_model(config.model)})


def data_dir(config: Config) -> str:
    """Returns the directory of the token shards."""
    return config.data.path or os.path.join(config.directory, "data")


def tokenizer_dir(config: Config) -> str:
    return config.tokenizer.path or os.path.join(config.directory, "tokenizer")


def open_tokenizer(config: Config) -> Tokenizer:
    """Returns the tokenizer of a configuration, with its choice of a chat template."""
    t = config.tokenizer
    return load_tokenizer(tokenizer_dir(config), t.chat_template, t.chat_template_kwargs)


def checkpoint_dir(config: Config) -> str:
    return os.path.join(config.directory, "checkpoints")
