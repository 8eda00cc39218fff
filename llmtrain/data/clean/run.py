"""Cleans the documents of `data.collect`, once: what is done is skipped, and other settings are refused."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from llmtrain.config.clean import CleanConfig
from llmtrain.config.clean.collect import kind_of
from llmtrain.config.clean.content import ContaminationConfig
from llmtrain.config.data import DataConfig
from llmtrain.config.rows import split_path
from llmtrain.data.tasks import write_task
from llmtrain.observe.contents import Checksums, files_at
from llmtrain.observe.files import write_whole
from llmtrain.observe.locks import making

MARKER = "cleaned.json"  # written last: all documents and the report are there
OURS = ".llmtrain-clean"  # written first: all else there is ours
BEGUN = "begun.json"  # the same, before the first task: what is refused before may be corrected
OTHER = "give another data.clean.path (or data.path), or delete {}"
COUNT_WORDS = {"repetition", "quality", "c4", "fineweb"}  # steps
HELD_OUT_BY = {"name", "type", "field", "max_bytes", "held_out", "count", "worked_share"}  # beside what files hold
REPORT_KEYS = {"path", "examples", "dry_run_documents"}  # keys of `data.clean` that documents do not depend on


def clean_dir(data: DataConfig, data_dir: str) -> str:
    """Returns the directory of cleaned documents."""
    return data.clean.path or os.path.join(data_dir, "clean")


def clean(data: DataConfig, data_dir: str, seed: int) -> None:
    """Reads and cleans all inputs of `data.collect` and writes documents and a report into `clean_dir`.

    Returns at once when that was done before; a job that was killed goes on behind its finished tasks. Raises
    ValueError when an input cannot be read, another job is at work there, or the directory holds one of other settings
    or other contents; RuntimeError for a task that fails again and again.
    """
    if not data.collect:
        return
    from llmtrain.data.clean.collect import refuse_unreadable

    for each in data.collect:
        refuse_unreadable(each)
    root = os.path.abspath(clean_dir(data, data_dir))
    own(root)
    with making(os.path.join(root, MARKER)):
        same = identity(data, seed)
        refuse_other(root, same)  # before sets are written over those that are there
        resolved = resolve(data, data_dir, root, seed)
        refuse_unknown(resolved.contamination)
        settings = {"settings": same, "contents": contents(data, resolved)}
        if not done(root, settings["contents"]):
            _clean(data, resolved, root, settings)
            write_whole(Path(root, MARKER), json.dumps(settings, indent=1) + "\n")


def _clean(data: DataConfig, resolved: CleanConfig, root: str, settings: dict[str, Any]) -> None:
    from llmtrain.data.clean.execute import execute
    from llmtrain.data.clean.job import make_job, phases
    from llmtrain.data.clean.report import write_report

    train_classifier(resolved, Path(root))
    try_steps(data, resolved)
    write_whole(Path(root, BEGUN), json.dumps(settings, indent=1) + "\n")
    job = make_job(root, data.collect, resolved, data.execution)
    with shown() as told:
        execute(job, data.executor, told)
    write_report(root, resolved, data.collect, {phase.name: phase.tasks for phase in phases(job)})


def own(root: str) -> None:
    """Makes the directory of a job. Raises ValueError when it holds files of others, or cannot be written."""
    if os.path.lexists(root) and not os.path.isdir(root):
        raise ValueError(f"data.clean.path={root}: is no directory; give another place")
    try:
        os.makedirs(root, exist_ok=True)
    except OSError as error:
        raise ValueError(f"data.clean.path={root}: cannot be made: {error.strerror}; give another place") from None
    if os.listdir(root) and not os.path.exists(os.path.join(root, OURS)):
        raise ValueError(
            f"data.clean.path={root}: holds files that cleaning did not write; give an empty or new directory"
        )
    write_whole(Path(root, OURS), "made by llmtrain data\n")


def resolve(data: DataConfig, data_dir: str, root: str, seed: int) -> CleanConfig:
    """Returns the settings of cleaning with the sets that documents must not hold, and the place of the classifier."""
    found: dict[str, Any] = {}
    if data.clean.contamination:
        sets = written_sets(data, data_dir, os.path.join(root, "evaluation"), root, seed)
        found["contamination"] = data.clean.contamination.model_copy(update={"sets": sets})
    if data.clean.classifier and data.clean.classifier.path is None:
        path = os.path.join(root, "classifier")
        found["classifier"] = data.clean.classifier.model_copy(update={"path": path})
    return data.clean.model_copy(update=found)


def written_sets(data: DataConfig, data_dir: str, directory: str, root: str, seed: int) -> dict[str, str]:
    """Writes what is held out of `data.tasks` and `data.sources` into `directory`; returns the paths of all sets that
    documents must not hold, by name. Raises ValueError when a source cannot be read."""
    from llmtrain.data.clean.evaluation_sets import free_name
    from llmtrain.data.clean.held_out_text import holding_out, write_held_out

    settings = data.clean.contamination
    assert settings is not None
    for task in data.tasks:
        os.makedirs(directory, exist_ok=True)
        write_task(task, directory, seed)
    sets = problem_sets(data, data_dir, directory)
    sources = holding_out(data.sources, root) if settings.text_ngrams else []
    for name, path in write_held_out(sources, seed, settings, directory).items():
        sets[free_name(name, sets)] = path
    return sets


def problem_sets(data: DataConfig, data_dir: str, directory: str) -> dict[str, str]:
    """Returns the paths of the sets of problems by name; those of `data.tasks` lie in `directory`."""
    from llmtrain.data.clean.evaluation_sets import evaluation_sets

    assert data.clean.contamination is not None
    made = {os.path.join(data_dir, f"{task.name}-held_out.jsonl") for task in data.tasks}
    own = data.model_copy(update={"held_out": None}) if data.held_out in made else data
    return evaluation_sets([(own, directory)], data.clean.contamination.sets)


def refuse_unknown(settings: ContaminationConfig | None) -> None:
    """Raises ValueError when `n_by_set` names no set."""
    if settings and (unknown := sorted(settings.n_by_set.keys() - settings.sets.keys())):
        known = ", ".join(settings.sets) or "none"
        raise ValueError(f"data.clean.contamination.n_by_set.{unknown[0]}: is no set, those are {known}; correct it")


def try_steps(data: DataConfig, resolved: CleanConfig) -> None:
    """Makes each step once. Raises ValueError for word lists and sets of problems that are broken: no task has to."""
    from llmtrain.data.clean.chain import chain
    from llmtrain.data.clean.step import closing_check

    for each in data.collect:
        steps = chain(resolved, kind_of(each), None)
        if COUNT_WORDS & {step.name for step in steps}:
            refuse_unsplit(resolved)
        for step in steps:
            with closing_check(step.make(step.settings)):
                pass


def refuse_unsplit(resolved: CleanConfig) -> None:
    """Raises ValueError when a language is to be kept whose words cannot be counted here."""
    from llmtrain.data.clean.words import base, by_language

    for code in resolved.language.keep if resolved.language else ():
        if by_language(base(code), resolved.words) is None:
            raise ValueError(
                f"data.clean.language.keep: {code}: its word splitter is not installed (datatrove's); "
                "install it, or set data.clean.words.unknown: regex"
            )


def train_classifier(resolved: CleanConfig, root: Path) -> None:
    """Trains the quality classifier, where there is to be one, unless it is there, and writes what was measured below
    `root` for the report."""
    if resolved.classifier:
        from llmtrain.data.clean.classifier import train

        assert resolved.classifier.path is not None
        measured = train(resolved.classifier, resolved.classifier.path)
        (root / "classifier").mkdir(exist_ok=True)
        write_whole(root / "classifier" / "measured.json", json.dumps(measured, indent=1) + "\n")


def identity(data: DataConfig, seed: int) -> str:
    """Returns a hash of the settings that cleaned documents depend on."""
    clean = data.clean.model_dump(exclude=REPORT_KEYS)
    tasks = [task.model_dump() for task in data.tasks] if data.clean.contamination else []
    looked_up = data.clean.contamination is not None and data.clean.contamination.text_ngrams
    read = [source for source in data.sources if looked_up and source.held_out and source.type != "cleaned"]
    text = [source.model_dump(include=HELD_OUT_BY) for source in read]
    held = [[each.model_dump() for each in data.collect], clean, data.execution.tasks, tasks, text, seed]
    return hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()


def contents(data: DataConfig, resolved: CleanConfig) -> dict[str, str]:
    """Returns what tells that files are those of another time: of each input a hash of its files' names, sizes and
    times, of all else that is read the checksum."""
    from llmtrain.data.clean.read.listing import fingerprint

    return {each.name: fingerprint(each) for each in data.collect} | checksums(resolved)


def checksums(clean: CleanConfig) -> dict[str, str]:
    """Returns the checksums of `lists_read`, by key, where they are there; the split that is named is a part of it."""
    split = {key: split_path(path) for key, path in lists_read(clean).items()}
    found, seen = {key: (files_at(path), parts) for key, (path, parts) in split.items()}, Checksums()
    return {key: ":".join([seen.of_all(files), *parts]) for key, (files, parts) in found.items() if files}


def lists_read(clean: CleanConfig) -> dict[str, str]:
    """Returns the paths of the lists, sets of problems and seeds that steps read, by key."""
    named: dict[str, str | None] = {}
    if clean.url:
        named |= {f"url.{key}": getattr(clean.url, key) for key in ("blocked_domains", "blocked_words")}
    if clean.classifier:
        named |= {f"classifier.{key}": getattr(clean.classifier, key) for key in ("good", "bad")}
    if clean.toxicity:
        named["toxicity.word_lists"] = clean.toxicity.word_lists
    if clean.contamination:
        named |= {f"contamination.sets.{name}": path for name, path in clean.contamination.sets.items()}
    return {f"data.clean.{key}": path for key, path in named.items() if path is not None}


def input_contents(data: DataConfig, data_dir: str) -> Iterator[tuple[str, str, str]]:
    """Yields (key, path, fingerprint) of the inputs on this machine; of one that is gone what finished cleaning saw."""
    from llmtrain.data.clean.read.listing import fingerprint
    from llmtrain.data.clean.read.stream import local_path

    marker = Path(clean_dir(data, data_dir), MARKER)
    was = json.loads(marker.read_text())["contents"] if marker.is_file() else {}
    for each in data.collect:
        if each.path is not None and local_path(each.path) is not None:
            yield f"data.collect.{each.name}", each.path, fingerprint(each) or was.get(each.name, "")


def check_unchanged(data: DataConfig, data_dir: str) -> None:
    """Raises ValueError when finished cleaning read other files than there are now. What is gone, or lies on other
    machines, is not looked at."""
    from llmtrain.data.clean.read.listing import fingerprint
    from llmtrain.data.clean.read.stream import local_path

    marker = Path(clean_dir(data, data_dir), MARKER)
    if not data.collect or not marker.is_file():
        return
    was = json.loads(marker.read_text())["contents"]
    here = [each for each in data.collect if each.path is not None and local_path(each.path) is not None]
    now = {each.name: fingerprint(each) for each in here} | checksums(data.clean)
    if changed := [name for name, seen in now.items() if seen and was.get(name, seen) != seen]:
        raise ValueError(
            f"{marker.parent} was cleaned from other contents of {', '.join(changed)}; give another data.path, or "
            f"delete {marker.parent} and the shards in {data_dir}"
        )


def check_held_out(data: DataConfig, data_dir: str) -> None:
    """Raises ValueError when finished cleaning did not look for the problems that documents evaluate on now."""
    root = clean_dir(data, data_dir)
    marker, own = Path(root, MARKER), os.path.join(root, "evaluation")
    if not data.collect or data.clean.contamination is None or not marker.is_file():
        return
    sets = {name: path for name, path in problem_sets(data, data_dir, own).items() if os.path.dirname(path) != own}
    now = checksums(CleanConfig(contamination=data.clean.contamination.model_copy(update={"sets": sets})))
    seen = json.loads(marker.read_text())["contents"]
    if new := [sets[name.rpartition(".sets.")[2]] for name, sum_ in now.items() if seen.get(name) != sum_]:
        raise ValueError(
            f"{', '.join(new)}: {root} was cleaned before it had these problems; give another data.path, or delete "
            f"{root} and the shards in {data_dir}"
        )


def begun(root: str) -> Path | None:
    """Returns the file that says of which settings and contents the job of a directory is; None if there is no job."""
    return next((path for name in (MARKER, BEGUN) if (path := Path(root, name)).is_file()), None)


def refuse_other(root: str, settings: str) -> None:
    """Raises ValueError when the documents, or a job that was begun, are from other settings."""
    path = begun(root)
    if path is not None and json.loads(path.read_text())["settings"] != settings:
        raise ValueError(
            f"{root} was cleaned with other settings of data.collect, data.clean, data.execution or seed, with other "
            f"data.tasks or other held-out text of data.sources, or by an earlier version; {OTHER.format(root)}"
        )


def done(root: str, contents: dict[str, str]) -> bool:
    """Returns whether the documents are there. Raises ValueError when they, or a job that was begun, are from other
    contents."""
    path = begun(root)
    if path is None:
        return False
    was = json.loads(path.read_text())["contents"]
    if changed := [name for name, seen in was.items() if contents.get(name) != seen]:
        raise ValueError(f"{root} was cleaned from other contents of {', '.join(changed)}; {OTHER.format(root)}")
    return path.name == MARKER


@contextmanager
def shown() -> Iterator[Any]:
    """Yields a function that shows how far each phase is."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    rows: dict[str, TaskID] = {}
    with Progress(*columns, console=Console(stderr=True)) as progress:

        def told(phase: str, finished: int, tasks: int) -> None:
            if phase not in rows:
                rows[phase] = progress.add_task(phase, total=tasks)
            progress.update(rows[phase], completed=finished)

        yield told
