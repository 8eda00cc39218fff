"""Takes models and tokenizers by their names on the Hugging Face hub, such as `org/name`: fetches their files into the
hub's cache, once, and puts the directory in the place of the name."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from llmtrain.config.document import ConfigError
from llmtrain.config.recipes import JUDGES, recipe_of
from llmtrain.config.schema import Config, RewardConfig, Section

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
SHAPE = ("config.json",)
TOKENIZER = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")
MODEL = (*TOKENIZER, "*.safetensors")  # never a pickle, never code
ELSEWHERE = ("*/*.json", "*/*.model", "*/*.safetensors", "consolidated*.safetensors")  # the same in other forms
GATED = "asks for consent: give it on the model's page, then `hf auth login`"
UNKNOWN = "has no model of that name, or not for you: correct it, or `hf auth login`"
UNREACHED = "cannot be asked from here (no network, or HF_HUB_OFFLINE is set): `hf download` it where there is one"


def located(config: Config, command: str, run_dir: str | None = None, weights: bool = True) -> Config:
    """Returns the configuration of a stage with the names on the hub that `command` reads replaced by directories.

    A path below `run_dir`, the directory of a whole run, is never a name: a stage may make it yet. Without `weights`
    only the shape of a model is fetched. Raises ConfigError when a name cannot be fetched.
    """
    for section, key, files in _read_by(config, command, weights):
        value = getattr(getattr(config, section), key)
        if is_name(value) and not (run_dir and _inside(value, run_dir)):
            if command == "export" and section == "model" and config.export.path is None:
                raise ConfigError(f"export.path: must be set, {section}.{key}={value} has no directory; give one")
            place = fetch(f"{section}.{key}={value}", value, files)
            changed = getattr(config, section).model_copy(update={key: place})
            config = config.model_copy(update={section: changed})
    recipe = recipe_of(command, config)
    for key, path in (recipe.weights(config) if recipe is not None else {}).items():
        if is_name(path) and not (run_dir and _inside(path, run_dir)):
            config = replaced(config, key.split("."), fetch(f"{key}={path}", path, MODEL if weights else SHAPE))
    judged = weights and _rewards(command, config)
    rewards = [_located_reward(each, run_dir) for each in config.rewards] if judged else None
    return config if rewards in (None, config.rewards) else config.model_copy(update={"rewards": rewards})


def replaced(section: Section, keys: Sequence[str], place: str) -> Any:
    """Returns the section with `place` at a key, given by its parts. An entry of a list is reached by its name, and its
    `path` is replaced."""
    first, *rest = keys
    there, new, name = getattr(section, first), place, ".".join(rest)
    if isinstance(there, list):
        new = [each.model_copy(update={"path": place}) if each.name == name else each for each in there]
    elif rest:
        new = replaced(there, rest, place)
    return section.model_copy(update={first: new})


def is_name(path: str | None) -> bool:
    """Returns whether a text means a name on the hub. It is a path where there is such a file, or a folder of the name
    before the slash: a mistake in a path must not fetch what somebody has put on the hub under that name."""
    if path is None or not HUB_NAME.fullmatch(path):
        return False
    return not os.path.exists(path) and not os.path.exists(path.partition("/")[0])


@cache
def fetch(asked: str, name: str, files: tuple[str, ...] = MODEL) -> str:
    """Returns the directory in the hub's cache that holds those `files` of a model that are there. Raises ConfigError,
    which begins with `asked`, when they are neither in the cache nor to be had."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return huggingface_hub.snapshot_download(name, allow_patterns=list(files), ignore_patterns=list(ELSEWHERE))
    except errors.GatedRepoError:
        reason = GATED
    except errors.RepositoryNotFoundError:
        reason = UNKNOWN
    except errors.LocalEntryNotFoundError:
        reason = UNREACHED
    except Exception as error:  # a full disk, a proxy, a server that is down
        reason = f"did not give it ({' '.join(str(error).split())[:200]}): try again"
    raise ConfigError(f"{asked}: does not exist, and the Hugging Face hub {reason}; or give a directory")


def _read_by(config: Config, command: str, weights: bool) -> list[tuple[str, str, tuple[str, ...]]]:
    """Returns (section, key, files) of what a command reads by path. Where it makes the tokenizer, `tokenizer.path` is
    where that goes."""
    trains = recipe_of(command) is not None
    makes = command in ("data", "tokenizer") or (trains and bool(config.data.sources or config.data.tasks))
    reads = trains or command in ("eval", "export", *JUDGES)
    model = MODEL if weights and command != "plan" else SHAPE
    found = [("model", "init_from", model)] * (reads or command == "plan")
    found += [("tokenizer", "base" if makes else "path", TOKENIZER)] * (reads or makes)
    return found + [("index", "model", MODEL), ("index", "tokenizer", TOKENIZER)] * (command == "index")


def _rewards(command: str, config: Config) -> bool:
    """Says whether a command reads the section `rewards`."""
    recipe = recipe_of(command, config)
    return command in ("eval", "judge") or (recipe is not None and recipe.reads_rewards)


def _located_reward(reward: RewardConfig, run_dir: str | None) -> RewardConfig:
    """Returns a reward whose model, if it has a name on the hub, is a directory. It keeps the name that it has."""
    if not is_name(reward.model) or (run_dir and _inside(reward.model, run_dir)):
        return reward
    return reward.model_copy(update={"model": fetch(f"rewards.{reward.name}.model={reward.model}", reward.model)})


def _inside(path: str, directory: str) -> bool:
    return os.path.abspath(path).startswith(os.path.abspath(directory) + os.sep)
