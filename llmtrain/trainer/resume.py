"""Saves a run with what a checkpoint says beside the weights, checks which checkpoints it may go on from, and goes
on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from llmtrain import __version__
from llmtrain.arch.parameters import is_block_matrix
from llmtrain.checkpoint.group import together
from llmtrain.checkpoint.load import CheckpointReader
from llmtrain.checkpoint.manifest import newest_intact
from llmtrain.checkpoint.roles import MAIN, Roles, held_roles, joined_shapes, joined_states, read_role
from llmtrain.checkpoint.saver import Saver
from llmtrain.config.load import dump
from llmtrain.data.mix import ORDER
from llmtrain.model.decoder import trained_shapes
from llmtrain.observe.files import write_whole
from llmtrain.observe.log import log
from llmtrain.observe.metrics import Events
from llmtrain.trainer.identity import (
    Record,
    as_record,
    changes,
    differences,
    line,
    other_adapters,
    other_function,
    record_of,
    recorded,
    write_record,
)
from llmtrain.trainer.job import GuardState, Job, checkpoint_dir, keep_generation, resolved


def check_same_run(job: Job, reader: CheckpointReader, path: str) -> None:
    """Raises ValueError, with a line for each difference, when the checkpoint is of other models or optimizers, of
    another recipe, or of a run that takes its samples otherwise."""
    if set(held_roles(reader)) != set(job.engines):
        held, trained = (", ".join(sorted(roles)) for roles in (held_roles(reader), job.engines))
        raise ValueError(f"{path}: holds the models {held}, and this run trains {trained}; give it another name")
    lines = [text for role in job.engines for text in state_differences(job, role, read_role(reader, role), path)]
    lines += base_differences(job, reader, path)
    found = differences(as_record(reader.state), record_now(job), job.recipe)
    lines += [line(each, path) for each in found if not each[0].startswith(("model.", "optim."))]  # told above, by role
    if lines:
        raise ValueError("\n".join(dict.fromkeys(lines)))


def named(role: str) -> str:
    """Returns how a message about a model begins; the main one needs no name."""
    return "" if role == MAIN else f"{role}: "


def record_now(job: Job) -> Record:
    """Returns the record of the job as it is now."""
    return record_of(job.config.model_copy(update={"model": job.model}), job.recipe, job.contents)


def state_differences(job: Job, role: str, reader: CheckpointReader, path: str) -> Iterator[str]:
    """Yields what a user is told when a role, whose part of the checkpoint `reader` reads, has other adapters, other
    parameters, another optimizer, or another function of its weights."""
    now = job.model_of(role).model_dump(mode="json")
    if adapters := list(other_adapters(reader.state["model"], now)):
        yield from (line((named(role) + key, before, after), path) for key, before, after in adapters)
        return
    if set(reader.names()) != set(trained_shapes(job.model_of(role))):
        yield f"{named(role)}{path}: holds other parameters than the model section describes; use the section it had"
        return
    was, is_now = reader.state.get("optim") or reader.state["config"]["optim"]["name"], job.engines[role].optim.name
    if was != is_now:
        yield (
            f"{named(role)}optim.name={is_now}: must stay {was}, whose state {path} holds; to go on from its weights "
            f"alone, set model.init_from={path} and give the run another name"
        )
    elif is_now == "muon":
        yield from muon_differences(job, role, reader, path)
    for key, before, after in other_function(reader.state["model"], now, bool(job.config.train.seq_ramp)):
        yield line((named(role) + key, before, after), path)


def muon_differences(job: Job, role: str, reader: CheckpointReader, path: str) -> Iterator[str]:
    """Yields a line when the checkpoint holds AdamW's state of what Muon updates: experts, in earlier versions."""
    matrices = [name for name, shape in trained_shapes(job.model_of(role)).items() if is_block_matrix(name, shape)]
    if others := [name for name in matrices if name in reader.names() and "momentum" not in reader.keys(name)]:
        yield (
            f"{named(role)}{path}: holds AdamW's state of {others[0]} ({len(others)} such), which Muon updates since; "
            f"to go on from its weights alone, set model.init_from={path} and give the run another name"
        )


def base_differences(job: Job, reader: CheckpointReader, path: str) -> Iterator[str]:
    """Yields what a user is told when the adapters of a checkpoint were trained on other weights."""
    if job.model.lora is not None and reader.state["model"].get("lora") and job.base != reader.state["base"]:
        yield (
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


def save(job: Job, last: bool = False) -> None:
    """Saves a checkpoint of this step (a collective), the last one of the run; see `Saver.save`."""
    state = {
        "step": job.step,
        "tokens": job.tokens,
        "guard": asdict(job.guard),
        "recipe_state": job.state,
        "mesh": job.mesh.sizes,
        "recipe": job.recipe.name,
        "config": job.config.model_dump(mode="json"),
        "contents": job.contents,
        "order": ORDER,
        "versions": {"llmtrain": __version__, **{name: version(name) for name in ("torch", "deepspeed")}},
        **joined_states({role: state_of(job, role) for role in job.engines}),
    }
    bring_back(job)
    job.saver.save(state, last)


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
    together(job.mesh, lambda: begin(job) if job.mesh.rank == 0 else None)


def begin(job: Job) -> None:
    """Writes down what this run now is: config.yaml and run.json, and in events.jsonl the keys that changed since it
    was here last. A run that has nothing left to do leaves them as they are."""
    directory, step = job.config.directory, job.step
    if step >= job.config.train.steps:
        log(f"{directory}: {step} of {job.config.train.steps} steps are done; nothing is left to do")
        return
    was, now = recorded(directory), record_now(job)
    if step and was is not None and (changed := changes(was, now)):
        Events(os.path.join(directory, "events.jsonl")).write({"step": step, "event": "changed", "keys": changed})
        log(f"from step {step + 1} with other values of {', '.join(changed)}; see events.jsonl")
    write_record(directory, now)
    write_whole(os.path.join(directory, "config.yaml"), dump(resolved(job.config)))
    keep_generation(job.config)


def load_newest(job: Job) -> str | None:
    """Loads weights, optimizer, counters, what the recipe carries, and random state of the newest intact checkpoint;
    returns its path, None if there is none.

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
    job.state = reader.state.get("recipe_state", {})
    reader.restore_rng(job.mesh.rank)
    log(f"resumed {path}")
    return path
