"""Builds the trained models of a job, whose weights start from random values, a directory or a run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from llmtrain.arch.resolve import fields_from_directory
from llmtrain.arch.start import new_parameters, stored_model
from llmtrain.checkpoint.roles import MAIN
from llmtrain.checkpoint.source import fingerprint, locate, source_at
from llmtrain.config.schema import ModelConfig
from llmtrain.data.tokenizer import read_backend
from llmtrain.engine.build import Role, build_trained
from llmtrain.model.decoder import init_tensor, parameter_shapes
from llmtrain.model.vocab import resize_embedding
from llmtrain.trainer.job import Job
from llmtrain.trainer.resume import resume
from llmtrain.types import WeightSource


def build_engine(job: Job, total_steps: int) -> None:
    """Builds the model of a recipe that trains one: see `build_engines`."""
    config = job.config
    source = start_source(job)
    build_engines(job, [Role(MAIN, job.model, config.parallel, config.engine, source, config.optim, total_steps)])


def build_engines(job: Job, roles: Sequence[Role]) -> None:
    """Builds the trained models of a job, the main one among them, and goes on from the newest checkpoint of the run if
    there is one (a collective).

    Raises ValueError when there is no main one, two have one name, or another than the main has adapters: a checkpoint
    knows the base of that one alone.
    """
    names = [role.name for role in roles]
    if MAIN not in names or len(set(names)) < len(names):
        raise ValueError(f"roles {', '.join(names)}: must be one `{MAIN}`, which is exported, and others; rename them")
    for role in roles:
        if role.model.lora is not None and role.name != MAIN:
            raise ValueError(f"{role.name}: lora is for the {MAIN} alone; train this model whole")
        job.engines[role.name] = build_trained(role, job.mesh)
    resume(job)


def start_source(job: Job, model: ModelConfig | None = None) -> WeightSource:
    """Returns the weights before the first step of a model (None: the job's own, resolved): those of `model.init_from`
    of the document, else random ones. Adapters are new, and so is a scalar head on a language model. A collective."""
    model = model or job.model
    shapes, stored = parameter_shapes(model), None
    new = set(shapes)
    if job.config.model.init_from:
        place = locate(job.config.model.init_from, job.mesh)
        there = stored_model(model, fields_from_directory(job.config.model.init_from, {}))
        stored, new, rows = source_at(place, there, job.mesh), new_parameters(model, there), there.vocab_size
        if rows != model.vocab_size:
            stored = grown_vocabulary(stored, model.vocab_size, used_rows(job.config.model.init_from, rows))
        job.base = fingerprint(place) if job.model.lora else None
    return lambda name: init_tensor(name, shapes[name], model, job.config.seed) if name in new else stored(name)


def used_rows(directory: str, rows: int) -> int:
    """Returns how many of the `rows` of an embedding tokens of the tokenizer beside it use; without a tokenizer,
    all."""
    places = (directory, os.path.join(directory, "tokenizer"))  # in a Hugging Face directory, in a run
    found = next((place for place in places if os.path.isfile(os.path.join(place, "tokenizer.json"))), None)
    return rows if found is None else min(rows, 1 + max(read_backend(Path(found)).get_vocab().values()))


def grown_vocabulary(source: WeightSource, rows: int, used: int | None = None) -> WeightSource:
    """Returns the weights with `rows` rows of embedding and head, of which the first `used` (None: all there were) are
    kept."""
    grows = ("embed.weight", "head.weight")
    return lambda name: resize_embedding(source(name), rows, used) if name in grows else source(name)
