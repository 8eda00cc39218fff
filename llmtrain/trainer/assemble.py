"""Puts the parts of a training stage together. The stages share these functions and the loop, nothing else."""

from __future__ import annotations

import itertools
import os
import random
import signal
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmtrain.arch.adapters import adapter_shapes
from llmtrain.arch.resolve import contradictions, fields_from_directory, resolve_model
from llmtrain.checkpoint.group import together
from llmtrain.checkpoint.load import CheckpointReader
from llmtrain.checkpoint.manifest import newest_intact
from llmtrain.checkpoint.saver import Saver
from llmtrain.checkpoint.source import fingerprint, locate, source_at
from llmtrain.config.load import dump
from llmtrain.config.schema import Config, ModelConfig
from llmtrain.data.prepare import prepare
from llmtrain.data.tokenizer import Tokenizer, load_tokenizer, read_backend
from llmtrain.engine.base import Engine, make_engine
from llmtrain.model.decoder import init_tensor, parameter_shapes, trained_shapes
from llmtrain.model.vocab import resize_embedding
from llmtrain.observe.log import log, make_run_dir
from llmtrain.parallel.mesh import Mesh, init_mesh
from llmtrain.parallel.plan import WeightSource, parallelize
from llmtrain.parallel.watch import Watch


@dataclass
class GuardState:
    """What trainer.guard decides by; a part of every checkpoint."""

    losses: list[float] = field(default_factory=list)  # of the last updates, for spikes
    skips: int = 0  # updates left out in a row
    rewinds: list[list[int]] = field(default_factory=list)  # [back to step, steps, tokens skipped there] each

    def skipped_steps(self, step: int) -> int:
        """How far `step`, counted from 0, is ahead in the data because of rewinds."""
        return sum(steps for to_step, steps, _ in self.rewinds if to_step <= step)

    def skipped_tokens(self, step: int) -> int:
        """The same in tokens."""
        return sum(tokens for to_step, _, tokens in self.rewinds if to_step <= step)


@dataclass
class Job:
    """One stage on one rank."""

    config: Config
    model: ModelConfig  # resolved
    mesh: Mesh
    tokenizer: Tokenizer
    watch: Watch
    engine: Engine | None = None  # None on rollout workers
    step: int = 0  # finished steps of the stage
    tokens: int = 0  # seen in them
    guard: GuardState = field(default_factory=GuardState)
    base: str | None = None  # fingerprint of the weights that adapters are trained on
    saver: Saver | None = None  # made by the loop


def join(config: Config, generates: bool = False) -> Job:
    """Process groups, run directory, data and tokenizer: everything before the model."""
    seed_everything(config.seed)
    mesh = init_mesh(config.parallel, config.rollout if generates else None, config.engine.timeout_s)
    watch = Watch(config.engine.timeout_s)
    if mesh.role == "trainer":
        log(mesh.table())
        together(mesh, lambda: start_directory(config) if mesh.rank == 0 else None)
    if mesh.role == "rollout":
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)  # the trainers save first, then they let the workers go
    if mesh.link is not None:
        mesh.link.await_trainers("data", mesh.role)
    tokenizer = load_tokenizer(tokenizer_dir(config))
    model = resolve_model(config.model)
    if tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"model.vocab_size={model.vocab_size}: must hold the tokenizer's {tokenizer.vocab_size} tokens "
            f"({tokenizer_dir(config)}); raise it or use the tokenizer the model was trained with"
        )
    return Job(config, model, mesh, tokenizer, watch)


def seed_everything(seed: int) -> None:
    """Python, numpy and torch, the same on every rank."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def start_directory(config: Config) -> None:
    """Run directory with the resolved configuration, and the data if this stage describes how to make it."""
    make_run_dir(config.directory)
    with open(os.path.join(config.directory, "config.yaml"), "w", encoding="utf-8") as file:
        file.write(dump(resolved(config)))
    if config.data.sources or config.data.tasks:
        prepare(config.data, config.tokenizer, data_dir(config), tokenizer_dir(config), config.seed)


# What says which sample a step takes: another value would repeat some and skip others.
SAME = (
    *("seed", "train.seq_len", "train.global_batch_seqs", "train.batch_ramp", "train.seq_ramp"),
    *("grpo.prompts_per_step", "grpo.minibatches"),
)


def check_same_run(job: Job, reader: CheckpointReader, path: str) -> None:
    """Raises ValueError when the checkpoint is of another model or optimizer, or of a run that takes its samples
    otherwise."""
    if set(reader.names()) != set(trained_shapes(job.model)):
        raise ValueError(f"{path}: holds other parameters than the model section describes; use the section it had")
    check_same_base(job, reader, path)
    saved, now = reader.state["config"], job.config.model_dump(mode="json")
    if (was := saved["optim"]["name"]) != (is_now := now["optim"]["name"]):
        raise ValueError(
            f"optim.name={is_now}: must stay {was}, whose state {path} holds; to go on from its weights alone, set "
            f"model.init_from={path} and give the run another name"
        )
    samples = ((key, *(reduce(lambda part, name: part[name], key.split("."), c) for c in (now, saved))) for key in SAME)
    for key, is_now, was in itertools.chain(samples, other_function(job, reader)):
        if was != is_now:
            raise ValueError(
                f"{key}={is_now}: must stay {was}, with which {path} was made; or give the run another name"
            )


def other_function(job: Job, reader: CheckpointReader) -> list[tuple[str, Any, Any]]:
    """(key, now, as saved) where the same weights would mean something else: other factors, norms, positions."""
    saved, now = (ModelConfig.model_validate(m) for m in (reader.state["model"], job.model.model_dump(mode="json")))
    ramped = ("rope_theta", "rope_scaling") if job.config.train.seq_ramp else ()
    asked = {name: value for name, value in now if name not in ("preset", "init_from", *ramped)}
    return [(f"model.{name}", is_now, was) for name, is_now, was in contradictions(dict(saved), asked)]


def check_same_base(job: Job, reader: CheckpointReader, path: str) -> None:
    """Raises ValueError when the adapters of a checkpoint were trained on other weights, or have another scale."""
    lora = job.model.lora
    if lora is None:
        return
    was = reader.state["model"]["lora"]["alpha"]
    if was != lora.alpha:
        raise ValueError(f"model.lora.alpha={lora.alpha:g}: must stay {was:g}, with which {path} was made; set that")
    if job.base != reader.state["base"]:
        raise ValueError(
            f"model.init_from={job.config.model.init_from}: holds other weights than those that the adapters in {path} "
            "were trained on; put these back, or give the run another name"
        )


def resolved(config: Config) -> Config:
    """With the shape of the model written out."""
    return config.model_copy(update={"model": resolve_model(config.model)})


def data_dir(config: Config) -> str:
    """Of the token shards."""
    return config.data.path or os.path.join(config.directory, "data")


def tokenizer_dir(config: Config) -> str:
    return config.tokenizer.path or os.path.join(config.directory, "tokenizer")


def start_source(job: Job) -> WeightSource:
    """Weights before the first step: of `model.init_from`, else random ones; adapters are new. A collective."""
    shapes, stored = parameter_shapes(job.model), None
    if job.config.model.init_from:
        place = locate(job.config.model.init_from, job.mesh)
        rows = fields_from_directory(job.config.model.init_from, {})["vocab_size"]
        stored = source_at(place, job.model.model_copy(update={"vocab_size": rows}), job.mesh)
        if rows != job.model.vocab_size:
            stored = grown_vocabulary(stored, job.model.vocab_size, used_rows(job.config.model.init_from, rows))
        job.base = fingerprint(place) if job.model.lora else None
    new = shapes.keys() if stored is None else adapter_shapes(job.model).keys()
    return lambda name: init_tensor(name, shapes[name], job.model, job.config.seed) if name in new else stored(name)


def used_rows(directory: str, rows: int) -> int:
    """Of the `rows` of an embedding, those that a token of the tokenizer beside it has; without one, all."""
    places = (directory, os.path.join(directory, "tokenizer"))  # of a Hugging Face directory, of a run
    found = next((place for place in places if os.path.isfile(os.path.join(place, "tokenizer.json"))), None)
    return rows if found is None else min(rows, 1 + max(read_backend(Path(found)).get_vocab().values()))


def grown_vocabulary(source: WeightSource, rows: int, used: int | None = None) -> WeightSource:
    """With `rows` rows of embedding and head, of which the first `used` (None: all there were) are kept."""
    grows = ("embed.weight", "head.weight")
    return lambda name: resize_embedding(source(name), rows, used) if name in grows else source(name)


def build_engine(job: Job, total_steps: int) -> None:
    """The model on the mesh, in its engine, at the newest checkpoint of this run if there is one."""
    config = job.config
    parts = parallelize(job.model, job.mesh, config.parallel, config.engine)
    job.engine = make_engine(
        parts, start_source(job), job.mesh, config.parallel, config.engine, config.optim, total_steps
    )
    resume(job)


def checkpoint_dir(config: Config) -> str:
    return os.path.join(config.directory, "checkpoints")


def resume(job: Job) -> None:
    """Go on from the newest checkpoint, if there is one.

    Raises ValueError when there is and `checkpoint.resume` is never: the new run's would mix with the old one's.
    """
    path = load_newest(job)
    if path is not None and job.config.checkpoint.resume == "never":
        raise ValueError(
            f"checkpoint.resume=never: {path} is there already; give the run another name, or delete its directory"
        )


def load_newest(job: Job) -> str | None:
    """Weights, optimizer, counters and random state of the newest intact checkpoint, if there is one: -> its path.

    Raises ValueError when it is not of this run.
    """
    path = newest_intact(checkpoint_dir(job.config), job.mesh)
    if path is None:
        return None
    reader = CheckpointReader(path)
    check_same_run(job, reader, path)
    job.engine.load_fragments(reader.read, reader.state["optimizer_step"])
    job.engine.load_extra_state(reader.state["engine"])
    job.step, job.tokens = reader.state["step"], reader.state["tokens"]
    job.guard = GuardState(**reader.state["guard"])
    reader.restore_rng(job.mesh.rank)
    log(f"resumed {path}")
    return path
