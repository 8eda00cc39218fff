"""Shows on a sample what cleaning would drop, and what other thresholds would keep. Nothing is written.

How the sample is drawn: each input gives the same number of documents. Its files are cut into PARTS as for so many
tasks, the parts are taken in turn in an order drawn by a seed, a document from each, until REACH times as many as are
wanted were looked at; of these every one has the same chance. So the sample is spread over the files, but of large
files only the starts are seen. Duplicates are not looked for: a sample has few of those that its corpus has.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from pydantic import BaseModel, ValidationError
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from llmtrain.config.clean import CleanConfig, CollectConfig
from llmtrain.data.clean.chain import STEPS, make
from llmtrain.data.clean.report_samples import Reservoir, visible
from llmtrain.data.clean.step import Check, closing_check

Reader = Callable[[CollectConfig], PipelineStep]
"""Returns the step that reads the documents of an input."""

SEED = 0
PARTS, REACH = 32, 10
FACTORS = (0.5, 0.75, 1.25, 1.5, 2.0)  # other values, as multiples of the setting
FROM_ZERO = (0.01, 0.05, 0.1, 1, 5, 10)  # other values where the setting is 0; those that the key allows
TRIED_S = 20.0  # for the thresholds of a step; where one look at its documents takes too long, fewer are tried
NOT_THRESHOLDS = ("seed", "l2", "buckets")  # keys that make a step another one, not stricter or laxer
MAKES_TEXT = ("extract",)  # steps that are run once: they make text of pages


@dataclass
class Trial:
    """Holds what a key would keep at other values: shares of the documents that reached its step, by value, the one
    that is set too."""

    key: str
    setting: float
    shares: dict[float, float]


@dataclass
class StepTrial:
    """Holds what a step does to the sample. `reasons` has the number of dropped documents and an example of each."""

    name: str
    documents_in: int
    documents_out: int
    seconds: float
    reasons: dict[str, tuple[int, str]]
    trials: list[Trial] = field(default_factory=list)
    note: str = ""  # what was left out, and why


@dataclass
class DryRun:
    """Holds what a dry run saw. `sampled` has the documents taken and looked at by input."""

    sampled: dict[str, tuple[int, int]]
    steps: list[StepTrial]
    kept: int


def dry_run(settings: CleanConfig, inputs: Sequence[CollectConfig], documents: int, reader: Reader) -> DryRun:
    """Returns what the steps do to a sample of about `documents` documents, read by `reader`, in memory alone.

    A step that cannot be made, such as a classifier that is not trained yet, lets all documents pass, with a note that
    says why.
    """
    samples = {each.name: sample(reader(each), -(-documents // len(inputs))) for each in inputs}
    sampled = {name: (len(drawn.kept), drawn.seen) for name, drawn in samples.items()}
    held = [document for drawn in samples.values() for document in drawn.kept]
    steps = []
    for step in STEPS:
        section, kinds = getattr(settings, step.name), step.kinds.split()
        seen = [document for document in held if document.metadata.get("kind") in kinds]
        if section is not None and seen:
            trial, kept = tried(step.name, section, settings.words, seen)
            steps.append(trial)
            held = [document for document in held if document.metadata.get("kind") not in kinds] + kept
    return DryRun(sampled, steps, len(held))


def sample(reader: PipelineStep, size: int) -> Reservoir:
    """Returns a sample of what a step reads, drawn as the head of this file says."""
    order = list(range(PARTS))
    random.Random(SEED).shuffle(order)
    drawn = Reservoir(size)
    for document in islice(in_turn([iter(reader.run(None, rank, PARTS)) for rank in order]), size * REACH):
        drawn.add(document)
    return drawn


def in_turn(parts: list[Iterator[Document]]) -> Iterator[Document]:
    """Yields from each part one document after the other, until all are at their ends."""
    while parts:
        for part in list(parts):
            document = next(part, None)
            if document is None:
                parts.remove(part)
            else:
                yield document


def tried(name: str, section: BaseModel, words: Any, seen: Sequence[Document]) -> tuple[StepTrial, list[Document]]:
    """Returns what a step does to the documents that reach it, with other thresholds too, and those that it keeps."""
    kept, reasons, examples = [], Counter[str](), dict[str, str]()
    start = time.perf_counter()
    try:
        check = make((name, section, words))
    except (OSError, ValueError) as error:
        return StepTrial(name, len(seen), len(seen), 0.0, {}, note=f"not run: {error}"), list(seen)
    for document, reason, after in checked(check, seen):
        if reason is None:
            kept.append(after)
        else:
            reasons[reason] += 1
            examples.setdefault(reason, f"{document.id}: {document.text[:80]}")
    seconds = time.perf_counter() - start
    shown = {reason: (number, examples[reason]) for reason, number in reasons.most_common()}
    trial = StepTrial(name, len(seen), len(kept), seconds, shown)
    if name in MAKES_TEXT:
        trial.note = "makes the text: other values are not tried"
    else:
        try_others(trial, section, words, seen)
    return trial, kept


def checked(check: Check, seen: Sequence[Document]) -> Iterator[tuple[Document, str | None, Document]]:
    """Yields each document, why the check drops it or None, and the document as the check left it."""
    with closing_check(check):
        for document in seen:
            after = Document(document.text, document.id, document.media, deepcopy(document.metadata))
            yield document, check(after), after


def try_others(trial: StepTrial, section: BaseModel, words: Any, seen: Sequence[Document]) -> None:
    """Adds what other values of each number of a section would keep, in the order of the keys, while there is time."""
    end = time.perf_counter() + TRIED_S
    for key, setting in numbers(section.model_dump()):
        shares = {setting: trial.documents_out / trial.documents_in}
        for value, other in others(section, key, setting):
            if time.perf_counter() + trial.seconds > end:
                trial.note = f"other values are tried for {TRIED_S:.0f} s: not from {dotted(key)} on"
                return
            shares[value] = kept_share(make((trial.name, other, words)), seen)
        if len(shares) > 1:
            trial.trials.append(Trial(dotted(key), setting, dict(sorted(shares.items()))))


def kept_share(check: Check, seen: Sequence[Document]) -> float:
    """Returns the share of the documents that a check keeps."""
    return sum(reason is None for _, reason, _ in checked(check, seen)) / len(seen)


Key = tuple[str | int, ...]
"""The path of a number in a section."""


def numbers(value: Any, key: Key = ()) -> Iterator[tuple[Key, float]]:
    """Yields every number in the content of a section with its path, deadlines and NOT_THRESHOLDS left out."""
    name = str(key[-1]) if key else ""
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not name.endswith("_s") and name not in NOT_THRESHOLDS:
            yield key, value
    elif isinstance(value, Mapping | list | tuple):
        for part, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from numbers(inner, (*key, part))


def others(section: BaseModel, key: Key, setting: float) -> Iterator[tuple[float, BaseModel]]:
    """Yields values around a setting that its key allows, each with the section that has it."""
    values = [setting * factor for factor in FACTORS] if setting else FROM_ZERO
    if isinstance(setting, int):
        values = dict.fromkeys(round(value) for value in values if setting or value >= 1)
    for value in values:
        if value != setting:
            try:
                yield value, type(section).model_validate(replaced(section.model_dump(), key, value))
            except ValidationError:  # above what a share can be, say
                continue


def replaced(content: Any, key: Key, value: float) -> Any:
    """Returns the content of a section with another number at a path."""
    if not key:
        return value
    if isinstance(content, Mapping):
        return {**content, key[0]: replaced(content[key[0]], key[1:], value)}
    return [replaced(part, key[1:], value) if i == key[0] else part for i, part in enumerate(content)]


def dotted(key: Key) -> str:
    """Returns a path as it is written in overrides."""
    return ".".join(map(str, key))


def shown(dry: DryRun) -> RenderableType:
    """Returns what a dry run saw as tables for a terminal."""
    parts: list[RenderableType] = []
    for name, (taken, looked) in dry.sampled.items():
        parts.append(Text(visible(f"{name}: a sample of {taken:,} of the {looked:,} documents looked at", 200)))
    parts += [part for step in dry.steps for part in shown_step(step)]
    parts.append(Text(f"kept: {dry.kept:,} of {sum(taken for taken, _ in dry.sampled.values()):,}"))
    return Group(*parts)


def shown_step(step: StepTrial) -> Iterator[RenderableType]:
    """Yields the lines and tables of a step."""
    yield Text(f"\n{step.name}: {step.documents_out:,} of {step.documents_in:,} kept, {step.seconds:.2f} s", "bold")
    if step.note:
        yield Text(step.note)
    if step.reasons:
        table = Table("dropped", "documents", "for example", box=None, padding=(0, 2, 0, 0))
        for reason, (count, example) in step.reasons.items():
            table.add_row(*(Text(visible(" ".join(w.split()), 110)) for w in (reason, f"{count:,}", example)))
        yield table
    if without := [trial.key for trial in step.trials if len(set(trial.shares.values())) == 1]:
        yield Text("other values keep the same number of documents: " + ", ".join(without))
    if len(without) < len(step.trials):
        table = Table("key", "value: share kept (* is set)", box=None, padding=(0, 2, 0, 0))
        for trial in (trial for trial in step.trials if trial.key not in without):
            cells = (f"{v:g}{'*' * (v == trial.setting)}: {share:.1%}" for v, share in trial.shares.items())
            table.add_row(Text(trial.key), Text("   ".join(cells)))
        yield table
