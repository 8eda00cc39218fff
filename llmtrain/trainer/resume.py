"""Checkpoints of a run: what they say beside the weights, who may go on from one, and going on."""

from __future__ import annotations

import itertools
from dataclasses import asdict
from functools import reduce
from importlib.metadata import version
from typing import Any

from llmtrain import __version__
from llmtrain.arch.resolve import contradictions
from llmtrain.checkpoint.load import CheckpointReader
from llmtrain.checkpoint.manifest import newest_intact
from llmtrain.checkpoint.saver import Saver
from llmtrain.config.schema import ModelConfig
from llmtrain.model.decoder import trained_shapes
from llmtrain.observe.log import log
from llmtrain.trainer.job import GuardState, Job, checkpoint_dir

SAME = ("seed", "train.seq_len", "train.global_batch_seqs", "train.batch_ramp", "train.seq_ramp")
"""Keys that say which sample a step takes, beside `Recipe.same`: another value would repeat some and skip others."""


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
    keys = (*SAME, *job.recipe.same)
    samples = ((key, *(reduce(lambda part, name: part[name], key.split("."), c) for c in (now, saved))) for key in keys)
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


def make_saver(job: Job) -> Saver:
    """A collective."""
    settings, mesh = job.config.checkpoint, job.mesh
    group = mesh.side_group(job.config.engine.timeout_s) if settings.background else mesh
    return Saver(checkpoint_dir(job.config), job.engine, trained_shapes(job.model), settings, group)


def save(job: Job) -> None:
    """A checkpoint of this step (a collective); see `Saver.save`."""
    state = {
        "step": job.step,
        "optimizer_step": job.engine.step,
        "tokens": job.tokens,
        "engine": job.engine.extra_state(),
        "guard": asdict(job.guard),
        "mesh": job.mesh.sizes,
        "config": job.config.model_dump(mode="json"),
        "model": job.model.model_dump(mode="json"),
        "base": job.base,
        "versions": {"llmtrain": __version__, **{name: version(name) for name in ("torch", "deepspeed")}},
    }
    job.saver.save(state)


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
