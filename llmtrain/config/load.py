"""Converts YAML documents to configurations and back. Every error is one line: where, what, and how to fix it."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import yaml
from pydantic import ValidationError

from llmtrain.config.document import (
    ConfigError,
    Document,
    Dumper,
    Keys,
    Rename,
    as_it_is,
    merge,
    override,
    read_document,
    stage_sets,
)
from llmtrain.config.explain import explain
from llmtrain.config.recipes import RECIPES, config_class, run_config_class
from llmtrain.config.rounds import STAGE_NAME, names_a_round, unroll
from llmtrain.config.schema import Config, RunConfig

__all__ = ["ConfigError", "dump", "load", "load_plugins", "stage_config"]


def load(path: str, overrides: list[str]) -> Config:
    """Returns the configuration in the YAML file `path`, with its includes and `section.key=value` overrides, in that
    order.

    A document with `stages:` gives a RunConfig, and each of its stages is validated too. Raises ConfigError, one line
    for each fault.
    """
    load_plugins([path, *overrides])
    document = read_document(path, (), _move_keys)  # once more: now the keys of plugins are known too
    faults = _change(document, overrides, _moved)
    if "stages" not in document.data:
        return _validate(config_class(), document, [])
    config = _validate(run_config_class(), document, faults)
    _validate_stages(config, document, faults)
    return config


def load_plugins(arguments: Sequence[str]) -> Document:
    """Returns the document of a command line, with its overrides; its plugins are imported. Raises ConfigError."""
    document = read_document(arguments[0], ()) if arguments else Document()
    _change(document, arguments[1:], as_it_is)  # `load` tells the faults
    _import_plugins(document)
    return document


def _change(document: Document, overrides: Sequence[str], rename: Rename) -> list[str]:
    """Applies the overrides and unrolls blocks of stages, in place; returns a line for each fault of a block. Overrides
    of a stage of one round come last: before the blocks are unrolled there is no such stage."""
    late = [text for text in overrides if names_a_round(document, text)]
    for text in overrides:
        if text not in late:
            override(document, text, rename)
    faults = unroll(document)
    for text in late:
        override(document, text, rename)
    return faults


def _import_plugins(document: Document) -> None:
    """Imports the modules of `plugins`, found on Python's path or below the working directory."""
    names = document.data.get("plugins", [])
    if not isinstance(names, list):
        raise ConfigError(f"{document.place(('plugins',))}: plugins: value {names!r}: must be a list of modules")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    for name in names:
        try:
            importlib.import_module(str(name))
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise ConfigError(f"{document.place(('plugins',))}: plugins: {name} cannot be imported: {reason}") from None


def _move_keys(document: Document) -> None:
    """Reads keys that recipes' sections had in earlier versions as what they are now, in one file."""
    for prefix, data in [((), document.data), *stage_sets(document.data)]:
        for recipe in RECIPES.values():
            section = data.get(recipe.name)
            for old in recipe.moved.keys() & (section.keys() if isinstance(section, dict) else ()):
                key, value = recipe.moved[old](section.pop(old))
                place = document.place((*prefix, recipe.name, old))
                if key in data:
                    raise ConfigError(f"{place}: {recipe.name}.{old}: is now `{key}`, which is written too; remove one")
                data[key], document.where[(*prefix, key)] = value, place


def _moved(keys: Keys, value: Any) -> Iterator[tuple[Keys, Any]]:
    """Yields what an override stands for, where it names keys that a recipe's section had in earlier versions."""
    *before, section, key = ("", *keys)
    moved = RECIPES[section].moved if section in RECIPES else {}
    if key in moved:
        new, value = moved[key](value)
        yield (*before[1:], new), value
        return
    moved = RECIPES[key].moved if key in RECIPES and isinstance(value, dict) else {}
    yield keys, {name: each for name, each in value.items() if name not in moved} if moved else value
    for old in moved.keys() & value.keys() if moved else ():
        new, each = moved[old](value[old])
        yield (*keys[:-1], new), each


def dump(config: Config) -> str:
    """Returns the configuration as YAML; loading it gives an equal one.

    A model that still takes fields from elsewhere (a preset, other weights, a stage) is written as the user wrote it: a
    default written out would count as chosen. So would `train.steps` beside `train.epochs`.
    """
    data = config.model_dump(mode="json")
    if config.train.epochs is not None:
        data["train"] = {name: value for name, value in data["train"].items() if name != "steps"}
    if isinstance(config, RunConfig) or config.model.preset or config.model.init_from:
        data["model"] = config.model.model_dump(mode="json", exclude_unset=True)
    return yaml.dump(data, Dumper=Dumper, sort_keys=False, width=120)


def stage_config(run: RunConfig, name: str) -> Config:
    """Returns the configuration of one stage: the shared sections with the stage's `set` merged over them.

    Its run directory is `<run directory>/<stage>`, and `{run}` in every text is replaced by the run directory.
    """
    stage = next(s for s in run.stages if s.name == name)
    data = merge(run.model_dump(mode="json", exclude={"stages"}, exclude_unset=True), stage.set)
    data = {**data, "name": name, "run_dir": os.path.join(run.directory, name)}
    return config_class().model_validate_json(json.dumps(_fill(data, run.directory)), strict=True)


def _fill(value: Any, directory: str) -> Any:
    """Returns plain data with `{run}` replaced in every text."""
    if isinstance(value, str):
        return value.replace("{run}", directory)
    if isinstance(value, dict):
        return {k: _fill(v, directory) for k, v in value.items()}
    return [_fill(v, directory) for v in value] if isinstance(value, list) else value


def _validate(schema: type[Config], document: Document, faults: list[str]) -> Config:
    """Returns the validated configuration. Strict JSON rules hold: `true` is no number and '3' no count, but a list is
    a tuple. Raises ConfigError with what is found, behind the `faults` found before."""
    try:
        return schema.model_validate_json(json.dumps(document.data), strict=True)
    except ValidationError as error:
        raise _told([*faults, *(explain(schema, document, fault, ()) for fault in error.errors())]) from None


def _told(faults: list[str]) -> ConfigError:
    """Returns the error; what is wrong in every round of a block stands in it once."""
    return ConfigError("\n".join(dict.fromkeys(faults)))


def _validate_stages(config: RunConfig, document: Document, faults: list[str]) -> None:
    """Raises ConfigError with what is wrong with the stages, behind the `faults` found before."""
    faults = list(faults)
    names = [stage.name for stage in config.stages]
    for i, stage in enumerate(config.stages):
        at = f"{document.place(('stages', i, 'name'))}: stages.{stage.name}"
        if names.index(stage.name) != i or not STAGE_NAME.fullmatch(stage.name):
            faults.append(f"{at}: name '{stage.name}': must be unique, of letters, digits, `-`, `_` and `.`; rename it")
            continue
        for key in {"name", "run_dir"} & stage.set.keys():
            faults.append(f"{at}.set.{key}: follows from the stage's name; remove it")
        try:
            stage_config(config, stage.name)
        except ValidationError as error:
            faults += [explain(config_class(), document, fault, ("stages", i, "set")) for fault in error.errors()]
    if not config.stages:
        faults.append(f"{document.place(('stages',))}: stages: is empty; list at least one stage with name and command")
    if faults:
        raise _told(faults)
