"""What made a run: recipe, settings, and the contents of what it read. A run goes on only with the same.

`run.json` in the run directory holds it, and so does every checkpoint. What an earlier version did not write down is
not compared, but for what it is known to have done.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, TypedDict

import yaml

from llmtrain import __version__
from llmtrain.arch.generation import GENERATION
from llmtrain.arch.resolve import contradictions
from llmtrain.checkpoint.layout import STATE
from llmtrain.checkpoint.manifest import MANIFEST_SUM, list_checkpoints
from llmtrain.config.agent import AgentConfig
from llmtrain.config.environment import EnvironmentConfig
from llmtrain.config.load import load
from llmtrain.config.recipes import Recipe
from llmtrain.config.rows import split_path
from llmtrain.config.schema import Config, DataConfig, ModelConfig
from llmtrain.config.section import files_of
from llmtrain.data.mix import ORDER
from llmtrain.data.shards import MANIFEST, shard_files
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.data.tokenizer_base import read_entries
from llmtrain.observe.contents import Checksums, files_at
from llmtrain.observe.files import write_whole
from llmtrain.observe.metrics import read_metrics
from llmtrain.observe.owned import RUN_RECORD

TEMPLATE = "tokenizer.chat_template"  # a name, or a file
SAME = (
    "seed",
    "train.seq_len",
    "train.global_batch_seqs",
    "train.batch_ramp",
    "train.seq_ramp",
    "train.eval_seqs",
    "optim.name",
    TEMPLATE,
    "tokenizer.chat_template_kwargs",
)
"""Keys that say which sample a step takes or what a number means, beside `Recipe.same` and whole sections: another
value would repeat some samples and skip others, or mix two measures under one name."""
MEASURED = ("eval.text_seqs", "eval.problems", "eval.samples")  # as SAME, of a run that is measured beside its training
ANSWERS = ("max_new_tokens", "temperature", "top_p", "top_k", "stop", "skip_special_tokens")  # the same, of rollout
BY_CONTENTS = ("path", "sources", "tasks", "train", "held_out")  # of the section data: the files count, not their names
# Keys of the section data that rows do not depend on, or only through what stands in the shards.
NO_ROWS = ("collect", "clean", "executor", "execution", "workers", "verify", "megatron", "loader_workers")
OF_TEXT = ("mix", "temperature", "anneal", "packing")  # of the section data: which rows of text are taken
OF_SOURCES = ("weight", "max_epochs", "language")  # keys of a source that say which rows are taken, not what is in them
JUDGING = ("name", "function", "weight", "deadline_s", "dtype", "render")  # of a reward
OF_JUDGE = ("model", "votes", "temperature", "max_tokens", "lowest", "highest")  # of its rubric
OWN_SECTIONS = {"rollout.agent": AgentConfig, "rollout.environment": EnvironmentConfig}
PLACES = (  # of rollout: how it is sampled, not what
    *("generator", "placement", "workers", "max_batch_seqs", "max_logprob_gap", "verify"),
    *("tp", "vllm", "deadline_s", "restarts", "record"),
)
STREAMS = ("metrics.jsonl", "evaluations.jsonl", "samples.jsonl", "events.jsonl")
WRITTEN = ("config.yaml", RUN_RECORD, GENERATION, *STREAMS)  # into a run directory
EARLIER = {"name", "model", "train"}  # keys of every config.yaml of a run
ABSENT = object()
DATA_DEFAULTS = DataConfig().model_dump(mode="json") | {"mix": "blocks"}  # what earlier versions did

Contents = dict[str, dict[str, str]]
"""Maps a key to path and sha256 of what is read there."""


class Record(TypedDict):
    """Says what made a run. Example: {"recipe": "sft", "config": {"seed": 0, ...}, "contents": {"data.train": ...}}"""

    recipe: str | None  # None: not known
    config: dict[str, Any]
    contents: Contents
    order: int  # `data.mix.ORDER` of the version; 1: of those that did not write it


Difference = tuple[str, Any, Any]  # key, as it was, as it is now


def record_of(config: Config, recipe: Recipe, contents: Contents) -> Record:
    """Returns the record of a run as it is to be now, from its resolved configuration."""
    return {"recipe": recipe.name, "config": config.model_dump(mode="json"), "contents": contents, "order": ORDER}


def recorded(directory: str) -> Record | None:
    """Returns the record of a run directory, from `run.json` or else from its newest checkpoint; None if it has
    neither."""
    newest = list_checkpoints(os.path.join(directory, "checkpoints"))[-1:]
    for path in (os.path.join(directory, RUN_RECORD), *(os.path.join(place, STATE) for place in newest)):
        try:
            return as_record(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # a broken checkpoint is named when it is to be loaded
    return None


def as_record(state: dict[str, Any]) -> Record:
    """Returns the record in what a checkpoint says beside its tensors, or in run.json."""
    config = {**state["config"], "model": state.get("model", state["config"]["model"])}  # a checkpoint's is resolved
    recipe, contents = state.get("recipe"), state.get("contents", {})
    return {"recipe": recipe, "config": config, "contents": contents, "order": state.get("order", 1)}


def write_record(directory: str, record: Record) -> None:
    """Writes run.json."""
    about = {"llmtrain": __version__, "written": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    write_whole(os.path.join(directory, RUN_RECORD), json.dumps({**about, **record}, indent=1) + "\n")


def check_directory(directory: str, now: Record, recipe: Recipe) -> None:
    """Raises ValueError when the run directory is not this run's: it holds files that no run has written, or a run of
    another recipe, or checkpoints or metrics of a run that differs in what must stay."""
    check_files(directory)
    was = recorded(directory)
    if was is None:
        return
    found = differences(was, now, recipe)
    if list_checkpoints(os.path.join(directory, "checkpoints")):
        _refuse(found, directory)
    elif _has_lines(os.path.join(directory, "metrics.jsonl")):  # the same run starts anew and writes them again
        _refuse(found, directory, ", or move that directory away")
    else:  # nothing is lost when it starts anew, if it is the same run at all
        _refuse([each for each in found if each[0] in ("command", "name")], directory)


def check_files(directory: str) -> None:
    """Raises ValueError when the directory holds files under names of ours that no run that trains has written."""
    there = [name for name in WRITTEN if os.path.lexists(os.path.join(directory, name))]
    if there and recorded(directory) is None and not _of_earlier_version(directory):
        raise ValueError(
            f"{directory}: holds {', '.join(there)}, which no run of this recipe has written; give the run another "
            "name or run_dir, or move them away"
        )


def _of_earlier_version(directory: str) -> bool:
    """Says whether config.yaml and metrics.jsonl are those of a run of an earlier version, which had no run.json: a
    configuration that was written out whole, and lines with step and loss."""
    document, metrics = (os.path.join(directory, name) for name in ("config.yaml", "metrics.jsonl"))
    try:
        keys = yaml.safe_load(Path(document).read_text(encoding="utf-8"))
        if not isinstance(keys, dict) or not keys.keys() >= EARLIER:
            return False  # before `load`, which imports what a document names under `plugins`
        model = load(document, []).model
        lines = read_metrics(metrics)
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return model.head_dim is not None and all("loss" in each for each in lines)  # a document of a user's leaves it open


def _has_lines(path: str) -> bool:
    return os.path.isfile(path) and b"\n" in Path(path).read_bytes()


def _refuse(found: list[Difference], path: str, remedy: str = "") -> None:
    if found:
        raise ValueError("\n".join(line(each, path) + remedy for each in found))


def line(found: Difference, path: str) -> str:
    """Returns what a user is told of a difference."""
    key, was, now = found
    return f"{key}={_shown(now)}: must stay {_shown(was)}, with which {path} was made; or give the run another name"


def differences(was: Record, now: Record, recipe: Recipe) -> list[Difference]:
    """Returns everything that must have stayed and has not."""
    found: list[Difference] = []
    if was["recipe"] not in (None, now["recipe"]):
        found.append(("command", was["recipe"], now["recipe"]))
    kept = (was["config"], now["config"])
    beside, answers = (all(map(holds, kept)) for holds in (measures, measures_problems))
    measured = (*(MEASURED if beside else ()), *(f"rollout.{name}" for name in ANSWERS if answers))
    for key in dict.fromkeys((*same_keys(now["config"], recipe), *measured)):
        if key == TEMPLATE and key in was["contents"] and key in now["contents"]:
            continue  # a file before and now: what it holds is compared
        before, after = (_value(record["config"], key) for record in (was, now))
        if before is ABSENT and key.startswith("data."):  # of an earlier version, which had no such key
            before = DATA_DEFAULTS.get(key.removeprefix("data."), ABSENT)
        before = as_now(key, before)
        if before is not ABSENT and before != after:
            found.append((key, before, after))
    found += _order(was, now, recipe)
    found += _source_weights(*kept, recipe)
    if recipe.reads_rewards or answers:
        found += _rewards(*kept, None if recipe.reads_rewards else 1)
    models = (was["config"]["model"], now["config"]["model"])
    found += [*other_function(*models, ramped=bool(now["config"]["train"]["seq_ramp"])), *other_adapters(*models)]
    for key, content in now["contents"].items():
        before = was["contents"].get(key, content)
        if before["sha256"] != content["sha256"]:
            found.append((key, before, content))
    return found


def as_now(key: str, was: Any) -> Any:
    """Returns what stood at a key; of an agent or an environment with the keys that came later, which changed nothing
    at their defaults."""
    if not isinstance(was, dict) or key not in OWN_SECTIONS:
        return was
    try:
        return OWN_SECTIONS[key].model_validate(was).model_dump(mode="json")
    except ValueError:  # it had a key that is no more
        return was


def measures(config: dict[str, Any]) -> bool:
    """Returns whether a run is measured beside its training."""
    return bool(config.get("eval", {}).get("every_steps"))


def measures_problems(config: dict[str, Any]) -> bool:
    """Returns whether it answers problems for that, which the first reward judges."""
    return measures(config) and bool(config["eval"]["problems"] and config["data"]["held_out"])


def trains_text(config: dict[str, Any], recipe: Recipe) -> bool:
    """Returns whether rows of the shards are trained on."""
    return bool(recipe.packs_text or config["data"]["replay_seqs"])


def same_keys(config: dict[str, Any], recipe: Recipe) -> list[str]:
    """Returns the keys whose values must stay."""
    free = (*BY_CONTENTS, *NO_ROWS, *(() if trains_text(config, recipe) else OF_TEXT))
    of_data = (f"data.{name}" for name in config["data"] if name not in free)
    keys = [*SAME, *recipe.same, *of_data]
    if recipe.samples:
        keys += [f"rollout.{name}" for name in config["rollout"] if name not in PLACES]
    return ["name", *keys] if config["run_dir"] else keys  # else the directory follows the name


def other_function(was: dict[str, Any], now: dict[str, Any], ramped: bool) -> list[Difference]:
    """Returns where the same weights would mean something else under another model section: other factors, norms,
    positions. With `ramped` positions change within a run."""
    saved, asked = (ModelConfig.model_validate(section) for section in (was, now))
    left_out = ("preset", "init_from", *(("rope_theta", "rope_scaling") if ramped else ()))
    written = {name: value for name, value in asked if name not in left_out}
    return [(f"model.{name}", before, after) for name, after, before in contradictions(dict(saved), written)]


def other_adapters(was: dict[str, Any], now: dict[str, Any]) -> Iterator[Difference]:
    """Yields where the adapters of two resolved model sections differ: one has none, or others. The order of targets
    does not count."""
    before, after = was.get("lora"), now.get("lora")
    if before is None or after is None:
        if before != after:
            yield "model.lora", before, after
        return
    for name, value in after.items():
        if name in before and _unordered(before[name]) != _unordered(value):
            yield f"model.lora.{name}", before[name], value


def _unordered(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) else value


def changes(was: Record, now: Record) -> dict[str, list[Any]]:
    """Returns key -> [was, now] of every setting that differs."""
    before, after = (dict(_flat(record["config"], "")) for record in (was, now))
    return {key: [before[key], value] for key, value in after.items() if key in before and before[key] != value}


def _order(was: Record, now: Record, recipe: Recipe) -> Iterator[Difference]:
    """Yields a line where the version that made a run took other rows of text: where shares of sources change."""
    data, even = now["config"]["data"], was["config"]["data"].get("mix") == "even"
    if was["order"] == now["order"] or not even or not trains_text(now["config"], recipe):
        return  # blocks and even shares are as they were
    capped = [f"data.sources.{each['name']}.max_epochs" for each in data["sources"] if each["max_epochs"] is not None]
    for key in [*capped, *(["data.anneal"] if data["anneal"] else [])][:1]:
        yield f"order of rows with {key}", f"number {was['order']}", f"number {now['order']} in this version"


def _source_weights(was: dict[str, Any], now: dict[str, Any], recipe: Recipe) -> Iterator[Difference]:
    """Yields where the shares of text sources differ, where text is trained on."""
    if not trains_text(now, recipe):
        return
    before, after = ({s["name"]: s for s in config["data"].get("sources", [])} for config in (was, now))
    if before.keys() != after.keys():
        yield "data.sources", list(before), list(after)
    for name, key in product(before.keys() & after.keys(), OF_SOURCES):
        if before[name].get(key) != after[name].get(key):
            yield f"data.sources.{name}.{key}", before[name].get(key), after[name].get(key)


def _rewards(was: dict[str, Any], now: dict[str, Any], count: int | None) -> Iterator[Difference]:
    """Yields the rewards, the first `count` of them (None: all), if they judge otherwise; of a function in a file, and
    of a model, the contents are compared, not the path."""
    before, after = was.get("rewards", now["rewards"])[:count], now["rewards"][:count]
    if len(before) == len(after) and all(map(_judge_alike, before, after)):
        return
    shown = (*JUDGING, "rubric")
    yield "rewards", *([{key: each.get(key) for key in shown} for each in rewards] for rewards in (before, after))


def _judge_alike(was: dict[str, Any], now: dict[str, Any]) -> bool:
    (file, _, name), (other, _, other_name) = ((each.get("function") or "").rpartition(":") for each in (was, now))
    in_files = file.endswith(".py") and other.endswith(".py")
    keys = [key for key in JUDGING if key in was and not (key == "function" and in_files and name == other_name)]
    if bool(was.get("model")) != bool(now.get("model")):
        return False
    judges = [each.get("rubric") and {key: each["rubric"][key] for key in OF_JUDGE} for each in (was, now)]
    return judges[0] == judges[1] and all(was[key] == now[key] for key in keys)


def contents_of(config: Config, recipe: Recipe, data_dir: str, tokenizer_dir: str, checksums: Checksums) -> Contents:
    """Returns path and checksum of what a run reads, by key; what is not there yet is left out."""
    found: Contents = {}
    places: dict[str, tuple[str | None, list[str]]] = {}
    own_rows = not recipe.packs_text and config.train.eval_every_steps
    if not recipe.packs_text and config.data.train:
        places["data.train"] = (config.data.train, files_at(split_path(config.data.train)[0]))
    beside = config.eval.every_steps > 0
    answers = beside and config.eval.problems > 0 and config.data.held_out is not None
    if config.data.held_out and (own_rows or answers):
        places["data.held_out"] = (config.data.held_out, files_at(split_path(config.data.held_out)[0]))
    text = recipe.packs_text or config.data.replay_seqs or (beside and config.eval.text and config.data.path)
    if text and os.path.isfile(os.path.join(data_dir, MANIFEST)):
        places["data.path"] = (data_dir, shard_files(data_dir))
    rewards = config.rewards if recipe.reads_rewards else config.rewards[:answers]
    places |= {f"rewards.{each.name}": (each.file, files_at(each.file)) for each in rewards if each.file}
    places |= {f"rewards.{each.name}": (each.model, weight_files(each.model)) for each in rewards if each.model}
    rubrics = {f"rewards.{each.name}.rubric": each.rubric.rubric for each in rewards if each.rubric}
    places |= {key: (path, files_at(path)) for key, path in rubrics.items() if path}
    own = {key: section for key in OWN_SECTIONS if (section := getattr(config.rollout, key.rpartition(".")[2]))}
    for key, section in own.items() if recipe.samples else ():
        places |= {f"{key}.{name}": (p, files_at(p)) for name, p in files_of(section.function, section.args).items()}
    if config.model.init_from:
        places["model.init_from"] = (config.model.init_from, weight_files(config.model.init_from))
    places |= {key: (path, weight_files(path)) for key, path in recipe.weights(config).items()}
    template = config.tokenizer.chat_template
    if not recipe.packs_text and template is not None and os.path.isfile(template):
        places[TEMPLATE] = (template, [template])
    for key, (path, files) in places.items():
        if files:
            found[key] = {"path": str(path), "sha256": checksums.of_all(files)}
    return found | tokenizer_contents(tokenizer_dir)


def weight_files(path: str) -> list[str]:
    """Returns the files whose contents tell the weights of a run (its newest checkpoint), checkpoint or model."""
    newest = list_checkpoints(os.path.join(path, "checkpoints"))[-1:]
    checksums = os.path.join(*newest or [path], MANIFEST_SUM)
    return [checksums] if os.path.isfile(checksums) else files_at(os.path.join(path, "*.safetensors"))


def tokenizer_contents(directory: str) -> Contents:
    """Returns the fingerprint of a tokenizer, and a checksum of its chat template."""
    if not os.path.isfile(os.path.join(directory, "tokenizer.json")):
        return {}
    template = json.dumps(read_entries(Path(directory)).get("chat_template"))
    return {
        "tokenizer.path": {"path": directory, "sha256": load_tokenizer(directory).fingerprint},
        "tokenizer's chat template": {"path": directory, "sha256": hashlib.sha256(template.encode()).hexdigest()},
    }


def _value(node: Any, key: str) -> Any:
    """Returns what stands at a key; behind a list it is that of each entry. ABSENT where one is not there."""
    first, _, rest = key.partition(".")
    there = node.get(first, ABSENT) if isinstance(node, dict) else ABSENT
    if isinstance(there, list) and rest:
        values = [_value(entry, rest) for entry in there]
        return ABSENT if ABSENT in values else values
    return _value(there, rest) if rest else there


def _flat(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(node, dict):
        yield prefix, node
        return
    for name, value in node.items():
        yield from _flat(value, f"{prefix}.{name}" if prefix else name)


def _shown(value: Any) -> str:
    if isinstance(value, dict) and value.keys() == {"path", "sha256"}:
        return f"{value['path']} (sha256 {value['sha256'][:12]})"
    return str(value)
