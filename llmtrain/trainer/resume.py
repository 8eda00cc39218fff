"""Saves a run with what a checkpoint says beside the weights, checks which checkpoints it may go on from, and goes
on."""

from __future__ import annotations

from dataclasses import asdict
from functools import reduce
from importlib.metadata import version
from typing import Any

from llmtrain import __version__
from llmtrain.arch.parameters import is_block_matrix
from llmtrain.arch.resolve import contradictions
from llmtrain.checkpoint.load import CheckpointReader
from llmtrain.checkpoint.manifest import newest_intact
from llmtrain.checkpoint.roles import MAIN, Roles, held_roles, joined_shapes, joined_states, read_role
from llmtrain.checkpoint.saver import Saver
from llmtrain.config.schema import ModelConfig
from llmtrain.model.decoder import trained_shapes
from llmtrain.observe.log import log
from llmtrain.trainer.job import GuardState, Job, checkpoint_dir

SAME = ("seed", "train.seq_len", "train.global_batch_seqs", "train.batch_ramp", "train.seq_ramp")
"""Lists the keys that say which sample a step takes, beside `Recipe.same`: another value would repeat some and skip
others."""


def check_same_run(job: Job, reader: CheckpointReader, path: str) -> None:
    """Raises ValueError when the checkpoint is of other models or optimizers, or of a run that takes its samples
    otherwise."""
    if set(held_roles(reader)) != set(job.engines):
        held, trained = (", ".join(sorted(roles)) for roles in (held_roles(reader), job.engines))
        raise ValueError(f"{path}: holds the models {held}, and this run trains {trained}; give it another name")
    for role in job.engines:
        check_same_state(job, role, read_role(reader, role), path)
    check_same_base(job, reader, path)
    saved, now = reader.state["config"], job.config.model_dump(mode="json")
    for key in (*SAME, *job.recipe.same):
        is_now, was = (reduce(lambda part, name: part[name], key.split("."), config) for config in (now, saved))
        check_stayed(key, is_now, was, path)
    for role in job.engines:
        for key, is_now, was in other_function(job, role, read_role(reader, role)):
            check_stayed(named(role) + key, is_now, was, path)


def named(role: str) -> str:
    """Returns how a message about a model begins; the main one needs no name."""
    return "" if role == MAIN else f"{role}: "


def check_same_state(job: Job, role: str, reader: CheckpointReader, path: str) -> None:
    """Raises ValueError when a role, whose part of the checkpoint `reader` reads, has other parameters or another
    optimizer."""
    if set(reader.names()) != set(trained_shapes(job.model_of(role))):
        raise ValueError(
            f"{named(role)}{path}: holds other parameters than the model section describes; use the section it had"
        )
    was, is_now = reader.state.get("optim") or reader.state["config"]["optim"]["name"], job.engines[role].optim.name
    if was != is_now:
        raise ValueError(
            f"{named(role)}optim.name={is_now}: must stay {was}, whose state {path} holds; to go on from its weights "
            f"alone, set model.init_from={path} and give the run another name"
        )
    if is_now == "muon":
        check_muon_state(job, role, reader, path)


def check_muon_state(job: Job, role: str, reader: CheckpointReader, path: str) -> None:
    """Raises ValueError when the checkpoint holds AdamW's state of what Muon updates: experts, in earlier versions."""
    matrices = [name for name, shape in trained_shapes(job.model_of(role)).items() if is_block_matrix(name, shape)]
    if others := [name for name in matrices if "momentum" not in reader.keys(name)]:
        raise ValueError(
            f"{named(role)}{path}: holds AdamW's state of {others[0]} ({len(others)} such), which Muon updates since; "
            f"to go on from its weights alone, set model.init_from={path} and give the run another name"
        )


def check_stayed(key: str, is_now: Any, was: Any, path: str) -> None:
    """Raises ValueError when a value is not the one that the checkpoint was made with."""
    if was != is_now:
        raise ValueError(f"{key}={is_now}: must stay {was}, with which {path} was made; or give the run another name")


def other_function(job: Job, role: str, reader: CheckpointReader) -> list[tuple[str, Any, Any]]:
    """Returns (key, now, as saved) where the same weights would mean something else: other factors, norms,
    positions."""
    sections = (reader.state["model"], job.model_of(role).model_dump(mode="json"))
    saved, now = (ModelConfig.model_validate(section) for section in sections)
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
    """Returns the saver of all trained models of the job (a collective)."""
    settings, mesh = job.config.checkpoint, job.mesh
    group = mesh.side_group(job.config.engine.timeout_s) if settings.background else mesh
    shapes = joined_shapes({role: trained_shapes(job.model_of(role)) for role in job.engines})
    bring_back(job)
    return Saver(checkpoint_dir(job.config), Roles(job.engines), shapes, settings, group)


def save(job: Job) -> None:
    """Saves a checkpoint of this step (a collective); see `Saver.save`."""
    state = {
        "step": job.step,
        "tokens": job.tokens,
        "guard": asdict(job.guard),
        "mesh": job.mesh.sizes,
        "config": job.config.model_dump(mode="json"),
        "versions": {"llmtrain": __version__, **{name: version(name) for name in ("torch", "deepspeed")}},
        **joined_states({role: state_of(job, role) for role in job.engines}),
    }
    bring_back(job)
    job.saver.save(state)


def state_of(job: Job, role: str) -> dict[str, Any]:
    """Returns what a checkpoint says of a trained model beside its tensors."""
    engine = job.engines[role]
    return {
        "optimizer_step": engine.step,
        "engine": engine.extra_state(),
        "model": job.model_of(role).model_dump(mode="json"),
        "optim": engine.optim.name,
        "base": job.base if role == MAIN else None,
    }


def bring_back(job: Job) -> None:
    """Moves all trained models to the device: on the host they can be neither saved nor loaded."""
    for engine in job.engines.values():
        engine.to_device()


def resume(job: Job) -> None:
    """Goes on from the newest checkpoint, if there is one.

    Raises ValueError when there is one and `checkpoint.resume` is never: the new run's checkpoints would mix with the
    old one's.
    """
    path = load_newest(job)
    if path is not None and job.config.checkpoint.resume == "never":
        raise ValueError(
            f"checkpoint.resume=never: {path} is there already; give the run another name, or delete its directory"
        )


def load_newest(job: Job) -> str | None:
    """Loads weights, optimizer, counters and random state of the newest intact checkpoint; returns its path, None if
    there is none.

    Raises ValueError when it is not of this run.
    """
    path = newest_intact(checkpoint_dir(job.config), job.mesh)
    if path is None:
        return None
    reader = CheckpointReader(path)
    check_same_run(job, reader, path)
    bring_back(job)
    for role, engine in job.engines.items():
        own = read_role(reader, role)
        engine.load_fragments(own.read, own.state["optimizer_step"])
        engine.load_extra_state(own.state["engine"])
    job.step, job.tokens = reader.state["step"], reader.state["tokens"]
    job.guard = GuardState.of_checkpoint(reader.state["guard"])
    reader.restore_rng(job.mesh.rank)
    log(f"resumed {path}")
    return path
