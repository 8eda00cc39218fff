"""Checks what is collected and how it is cleaned. Each rule yields lines with value, rule and remedy."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from importlib.util import find_spec

from llmtrain.rules.case import Case, Rules, command, either, here, pretrains

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")  # of folders, and of phases in the jobs of a cluster
OF_DATASETS = ("split", "configuration", "streamed")
SLURM_NEEDS = ("partition", "time")


def _inputs(case: Case) -> Iterator[str]:
    names = [each.name for each in case.config.data.collect]
    for each in case.config.data.collect:
        key = f"data.collect.{each.name}"
        if not NAME.fullmatch(each.name):
            yield f"{key}.name={each.name}: must be at most 100 letters, digits, _ . -, it names a folder; rename it"
        if each.type == "pydoc" and each.path is not None:
            yield f"{key}.path={each.path}: not with type pydoc, which reads no files; remove it"
        if each.type != "pydoc" and each.path is None:
            yield f"{key}.path: must be set, type {each.type} reads files; give a file, a directory, a glob or a URL"
        for name in OF_DATASETS if each.type != "datasets" else ():
            if getattr(each, name) != type(each).model_fields[name].default:
                yield f"{key}.{name}={getattr(each, name)}: only type datasets has it; remove it"
    if twice := sorted({name for name in names if names.count(name) > 1}):
        yield f"data.collect: {twice[0]!r} is named twice; rename one"


def _cleaned_sources(case: Case) -> Iterator[str]:
    names = [each.name for each in case.config.data.collect]
    for source in case.config.data.sources:
        if source.type == "cleaned" and source.path is None and names and source.name not in names:
            yield (
                f"data.sources.{source.name}: type cleaned has the name of an entry of data.collect, those are "
                f"{', '.join(names)}; correct it, or give the path of cleaned documents"
            )


def _files(case: Case) -> Iterator[str]:
    clean, paths = case.config.data.clean, dict[str, str | None]()
    if clean.url:
        paths |= {f"url.{key}": getattr(clean.url, key) for key in ("blocked_domains", "blocked_words")}
    if clean.classifier:
        paths |= {f"classifier.{key}": getattr(clean.classifier, key) for key in ("good", "bad")}
    if clean.toxicity:
        paths["toxicity.word_lists"] = clean.toxicity.word_lists
    if clean.contamination:
        paths |= {f"contamination.sets.{name}": path for name, path in clean.contamination.sets.items()}
    for key, path in paths.items() if case.config.data.collect else ():
        if path is not None and case.missing(path):
            yield f"data.clean.{key}={path}: does not exist; give a file that is there"


def _executor(case: Case) -> Iterator[str]:
    data = case.config.data
    if not data.collect:
        return
    if data.executor == "slurm":
        if missing := [key for key in SLURM_NEEDS if key not in data.execution.slurm]:
            yield f"data.executor=slurm: data.execution.slurm must have {' and '.join(missing)}; add what your site has"
    elif data.execution.slurm:
        yield f"data.execution.slurm: only data.executor=slurm reads it, not {data.executor}; remove one"


def _programs(case: Case) -> Iterator[str]:
    data = case.config.data
    if not data.collect:
        return
    if find_spec("datatrove") is None:
        yield "data.collect: needs the packages of the extra data; pip install 'llmtrain[data]' -c constraints.txt"
    if data.executor == "ray" and find_spec("ray") is None:
        yield "data.executor=ray: needs the package ray; pip install 'llmtrain[ray]' -c constraints.txt, or use local"
    if data.executor == "slurm" and shutil.which("sbatch") is None:
        yield "data.executor=slurm: there is no sbatch on this machine; start it where Slurm is, or use local"


_cleans = either(pretrains, command("data", "tokenizer"))
CLEANING_RULES: Rules = (
    *((_cleans, rule) for rule in (_inputs, _cleaned_sources, _files, _executor)),
    (here(_cleans), _programs),
)
