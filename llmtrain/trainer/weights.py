"""Builds the trained models of a job, whose weights start from random values, a directory or a run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from llmtrain.arch.resolve import fields_from_directory, resolve_model
from llmtrain.arch.start import new_parameters, stored_model, with_scalar_head
from llmtrain.checkpoint.roles import MAIN
from llmtrain.checkpoint.source import fingerprint, locate, source_at
from llmtrain.config.load import load
from llmtrain.config.schema import ModelConfig
from llmtrain.data.tokenizer import load_tokenizer, read_backend
from llmtrain.engine.build import Role, build_trained
from llmtrain.model.decoder import init_tensor, parameter_shapes
from llmtrain.model.vocab import resize_embedding
from llmtrain.trainer.job import Job, tokenizer_dir
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


def start_source(job: Job, model: ModelConfig | None = None, path: str | None = None) -> WeightSource:
    """Returns the weights before the first step of a model (None: the job's own, resolved): those at `path` (None:
    `model.init_from` of the document), else random ones. Adapters are new, and so is a scalar head on a language model.
    A collective."""
    model, path = model or job.model, path or job.config.model.init_from
    shapes, stored = parameter_shapes(model), None
    new = set(shapes)
    if path:
        place = locate(path, job.mesh)
        there = stored_model(model, fields_from_directory(path, {}))
        stored, new, rows = source_at(place, there, job.mesh), new_parameters(model, there), there.vocab_size
        if rows != model.vocab_size:
            stored = grown_vocabulary(stored, model.vocab_size, used_rows(path, rows))
        if model.lora is not None:
            job.base = fingerprint(place)
    return lambda name: init_tensor(name, shapes[name], model, job.config.seed) if name in new else stored(name)


def scalar_model(job: Job, path: str | None = None) -> ModelConfig:
    """Returns the resolved section of a model with a scalar head, on the body at `path` (None: on the job's own).

    Raises ValueError when the model at `path` reads other tokens than the job's.
    """
    if path is None:
        return with_scalar_head(job.model)
    model, found = with_scalar_head(resolve_model(ModelConfig(init_from=path))), tokenizer_beside(path)
    differs = found is not None and load_tokenizer(found).fingerprint != job.tokenizer.fingerprint
    if differs or model.vocab_size < job.tokenizer.vocab_size:
        raise ValueError(f"{path}: was trained with another tokenizer than this run has; give a model that shares it")
    return model


def used_rows(directory: str, rows: int) -> int:
    """Returns how many of the `rows` of an embedding tokens of the tokenizer beside it use; without a tokenizer,
    all."""
    found = tokenizer_beside(directory)
    return rows if found is None else min(rows, 1 + max(read_backend(Path(found)).get_vocab().values()))


def tokenizer_beside(directory: str) -> str | None:
    """Returns the directory of the tokenizer that goes with a Hugging Face directory or a run, None where there is
    none."""
    places, document = [directory, os.path.join(directory, "tokenizer")], os.path.join(directory, "config.yaml")
    if os.path.isfile(document):
        places.append(tokenizer_dir(load(document, [])))
    return next((place for place in places if os.path.isfile(os.path.join(place, "tokenizer.json"))), None)


def grown_vocabulary(source: WeightSource, rows: int, used: int | None = None) -> WeightSource:
    """Returns the weights with `rows` rows of embedding and head, of which the first `used` (None: all there were) are
    kept."""
    grows = ("embed.weight", "head.weight")
    return lambda name: resize_embedding(source(name), rows, used) if name in grows else source(name)
