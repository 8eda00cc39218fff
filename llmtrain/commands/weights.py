"""Says which weights a document means: those of its own run where that has trained, else those of `model.init_from`."""

from __future__ import annotations

import os

from llmtrain.arch.resolve import contradictions
from llmtrain.checkpoint.manifest import MANIFEST
from llmtrain.config.schema import Config, ModelConfig
from llmtrain.observe.owned import is_run
from llmtrain.trainer.identity import Record, line, other_adapters, recorded, tokenizer_contents
from llmtrain.trainer.job import tokenizer_dir


def of_own_run(config: Config) -> Config:
    """Returns the configuration with `model.init_from` = the run directory where that holds a run which has trained.

    Weights below the run directory may be given by `model.init_from` (an older checkpoint). Adapters of the run are
    merged, so the result has no `model.lora`. Raises ValueError, with a line for each difference, when the document is
    not the one of the run that is there.
    """
    directory, given = config.directory, config.model.init_from
    if not is_run(directory):
        return config
    was, older = recorded(directory), bool(given and _inside(given, directory))
    lines = [] if was is None else _other_adapters(was, config)
    if was is not None and not older:
        lines += [*_other_start(was, given, directory), *_other_model(was, config)]
    if lines:
        raise ValueError("\n".join(lines))
    if older:
        return config.model_copy(update={"model": config.model.model_copy(update={"lora": None})})
    return config.model_copy(update={"model": ModelConfig(init_from=directory)})


def home(source: str) -> str:
    """Returns the directory below which a result of these weights lies: of a checkpoint its run."""
    place = os.path.abspath(source)
    return os.path.dirname(os.path.dirname(place)) if os.path.isfile(os.path.join(place, MANIFEST)) else source


def _inside(path: str, directory: str) -> bool:
    path, directory = os.path.realpath(path), os.path.realpath(directory)
    return os.path.commonpath([path, directory]) == directory


def _other_start(was: Record, given: str | None, directory: str) -> list[str]:
    """Returns a line if the run was started from other weights than the document gives."""
    before = was["config"]["model"].get("init_from")
    if given is None or (before is not None and os.path.realpath(given) == os.path.realpath(before)):
        return []
    return [
        f"model.init_from={given}: the run in {directory} was started from {before or 'new weights'}, so this is not "
        f"its document; leave it as it was for the weights of that run, or set another name for those of {given}"
    ]


def _other_adapters(was: Record, config: Config) -> list[str]:
    """Returns a line for each key by which the adapters that the document has are not those of the run; it need not
    have any."""
    if config.model.lora is None:
        return []
    found = other_adapters(was["config"]["model"], config.model.model_dump(mode="json"))
    return [line(each, config.directory) for each in found]


def _other_model(was: Record, config: Config) -> list[str]:
    """Returns a line for each key by which the document's model or tokenizer is not that of the run."""
    saved = ModelConfig.model_validate(was["config"]["model"])
    ramped = ("rope_theta", "rope_scaling") if config.train.seq_ramp else ()
    asked = {name: getattr(config.model, name) for name in config.model.model_fields_set}
    asked = {name: value for name, value in asked.items() if name not in ("preset", "init_from", *ramped)}
    found = [(f"model.{name}", before, now) for name, now, before in contradictions(dict(saved), asked)]
    for key, now in tokenizer_contents(tokenizer_dir(config)).items():
        if (before := was["contents"].get(key, now))["sha256"] != now["sha256"]:
            found.append((key, before, now))
    return [line(each, config.directory) for each in found]
