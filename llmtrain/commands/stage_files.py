"""Says what a stage of a run reads that no stage makes, and whether its contents have changed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from llmtrain.arch.resolve import newest_step
from llmtrain.config.recipes import JUDGES, recipe_of
from llmtrain.config.rows import split_path
from llmtrain.config.schema import Config, TokenizerConfig
from llmtrain.config.tasks import files_of
from llmtrain.data.clean.run import input_contents, lists_read
from llmtrain.observe.contents import Checksums, files_at

MANIFEST_SUM = "manifest.sha256"  # of a checkpoint: covers all its files


def contents(command: str, config: Config, made: list[str], checksums: Checksums) -> dict[str, str]:
    """Returns by key the checksum of what a stage reads, but for what lies in the directories `made` by stages."""
    found, recipe = {}, recipe_of(command, config)
    weights = {"model.init_from", *(f"rewards.{reward.name}" for reward in config.rewards if reward.model)}
    weights |= set(recipe.weights(config)) if recipe is not None else set()
    for key, path in read_paths(command, config):
        if path is not None and not any(inside(path, directory) for directory in made):
            place = split_path(path)[0]  # a path of rows may name a split
            found[key] = checksums.of_all(weight_files(path) if key in weights else files_at(place))
    if makes_data(command, config):
        for key, path, fingerprint in input_contents(config.data, data_dir(config)):
            if not any(inside(path, directory) for directory in made):
                found[key] = fingerprint
    return found


def read_paths(command: str, config: Config) -> Iterator[tuple[str, str | None]]:
    """Yields (key, path) of what a stage reads."""
    data, recipe = config.data, recipe_of(command, config)
    if makes_data(command, config):
        yield "tokenizer.base", config.tokenizer.base
        yield from ((f"data.sources.{source.name}", source.path) for source in data.sources)
        yield from lists_read(data.clean).items() if data.collect else ()
        if data.collect and data.clean.contamination:
            yield "data.held_out", data.held_out
            # its rows alone: another prompt, or other examples, change no document
            yield from ((key, path) for key, path in files_of(config.eval.tasks) if key.endswith(".data"))
    if (recipe is not None and not recipe.packs_text) or command in JUDGES:
        yield "data.train", data.train
    evaluates = command == "eval" or (recipe is not None and config.eval.every_steps > 0)
    if (evaluates and config.eval.problems) or (recipe is not None and config.train.eval_every_steps):
        yield "data.held_out", data.held_out
    if command == "eval":
        yield from files_of(config.eval.tasks)
        yield "eval.lm_eval.include_path", config.eval.lm_eval.include_path
    judges = command in ("eval", "judge") or (recipe is not None and recipe.reads_rewards)
    first = int(evaluates and config.eval.problems > 0)  # beside training it alone judges
    rewards = config.rewards if judges else config.rewards[:first]
    yield from ((f"rewards.{reward.name}", reward.model or reward.file) for reward in rewards)
    yield from ((f"rewards.{each.name}.rubric", each.rubric.rubric) for each in rewards if each.rubric)
    if command == "judge":
        yield "judge.rubric", config.judge.rubric
    if command == "constitutional":
        yield "constitutional.principles", config.constitutional.principles
        yield "constitutional.agreement", config.constitutional.agreement
    if recipe is not None and (recipe.packs_text or data.replay_seqs):
        yield "data.path", data.path
    if evaluates and config.eval.text:
        yield "data.path", data.path
    if recipe is not None or command in ("eval", "export", *JUDGES):
        yield "tokenizer.path", config.tokenizer.path
        yield "model.init_from", config.model.init_from
    if (recipe is not None and not recipe.packs_text) or command in ("eval", *JUDGES):
        yield "tokenizer.chat_template", template_file(config.tokenizer)
    if recipe is not None:
        yield from recipe.weights(config).items()
    environment = config.rollout.environment
    if evaluates or (recipe is not None and recipe.samples):
        yield "rollout.environment.search.store", environment and environment.search and environment.search.store
    if command == "index":
        yield from ((f"index.documents.{each.name or i}", each.path) for i, each in enumerate(config.index.documents))
        yield from (("index.model", config.index.model), ("index.tokenizer", config.index.tokenizer))


def template_file(tokenizer: TokenizerConfig) -> str | None:
    """Returns the file that holds the chat template, None where it is one of the tokenizer's own."""
    template = tokenizer.chat_template
    return template if template is not None and os.path.isfile(template) else None


def made_by(command: str, config: Config) -> Iterator[str]:
    """Yields the directories that a stage makes."""
    yield config.directory
    if makes_data(command, config):
        yield data_dir(config)
        yield config.tokenizer.path or os.path.join(config.directory, "tokenizer")
    if command == "export" and config.export.path:
        yield config.export.path
    if command == "index" and config.index.path:
        yield config.index.path


def data_dir(config: Config) -> str:
    """Returns the directory of the data that a stage makes."""
    return config.data.path or os.path.join(config.directory, "data")


def stages_read(command: str, config: Config, makers: Mapping[str, str]) -> list[str]:
    """Returns the stages in whose directories lies what a stage reads, of those that `makers` names by directory."""
    paths = [path for _, path in read_paths(command, config) if path is not None]
    found = [stage for directory, stage in makers.items() if any(inside(path, directory) for path in paths)]
    return list(dict.fromkeys(found))


def made_tokenizer(command: str, config: Config, run: str, made: list[str]) -> str | None:
    """Returns the tokenizer directory of a stage that makes data, if it lies in the run directory outside all that
    stages before have `made`."""
    path = config.tokenizer.path
    if path is None or not makes_data(command, config) or not inside(path, run):
        return None
    return None if any(inside(path, directory) for directory in made) else path


def makes_data(command: str, config: Config) -> bool:
    """Says whether a stage makes data or a tokenizer where they are missing."""
    described = bool(config.data.sources or config.data.tasks)
    return command in ("data", "tokenizer") or (recipe_of(command) is not None and described)


def weight_files(path: str) -> list[str]:
    """Returns the files whose contents tell the weights in a run (its newest checkpoint), checkpoint or model."""
    newest = os.path.join(path, "checkpoints", f"step-{newest_step(path):08d}")
    checksums = os.path.join(newest if os.path.isdir(newest) else path, MANIFEST_SUM)
    return [checksums] if os.path.isfile(checksums) else files_at(os.path.join(path, "*.safetensors"))


def inside(path: str, directory: str) -> bool:
    """Says whether a path is a directory or lies in it."""
    path, directory = os.path.realpath(path), os.path.realpath(directory)
    return os.path.commonpath([path, directory]) == directory
