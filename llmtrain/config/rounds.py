"""Unrolls the blocks of a `run` document: each round of a block becomes stages of its own.

Behind this the document is a plain list of stages: checks, plan, hashes, resuming and report know nothing of rounds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from llmtrain.config.document import Document, Keys, dotted, entry_names, merge
from llmtrain.config.explain import explain
from llmtrain.config.schema import RepeatConfig, Section

WORD = re.compile(r"\{([A-Za-z_][^{}\s]*)\}")  # a placeholder
WORDS = ("round", "previous", "last")
STAGE_NAME = re.compile(r"\w[\w.-]*")
OF_A_RUN = re.compile(r"\{run\}/([^/]+)")  # a path in the directory of a stage


class _Blocks(Section):
    stages: list[RepeatConfig]


@dataclass
class _Unrolled:
    """Collects the stages, where each of their keys was written, and the faults on the way."""

    document: Document
    stages: list[Any] = field(default_factory=list)
    where: dict[Keys, str] = field(default_factory=dict)
    written: dict[Keys, Keys] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def complain(self, keys: Keys, words: str) -> None:
        """Notes a fault at `keys` of the file."""
        self.faults.append(f"{self.document.place(keys)}: {dotted(keys)}: {words}")

    def add(self, stage: Any, sources: Mapping[Keys, Keys], places: Mapping[Keys, str]) -> None:
        """Adds a stage. `sources` maps its sections to where they stand in the file, the later ones over the others;
        `places` are those of the entry that it comes from."""
        at: Keys = ("stages", len(self.stages))
        self.stages.append(stage)
        for section, source in sources.items():
            for keys, place in places.items():
                if keys[: len(source)] == source:
                    own = (*at, *section, *keys[len(source) :])
                    self.where[own], self.written[own] = place, keys


def unroll(document: Document) -> list[str]:
    """Replaces each block of the document's stages by the stages of its rounds, in place.

    Returns a line for each fault, those of a stage in each round again: what no block can be, names that do not tell
    the rounds apart, placeholders that mean nothing where they stand. A faulty block is unrolled all the same, so that
    faults behind these are found too.
    """
    entries = document.data.get("stages")
    if not isinstance(entries, list):
        return []
    found, last = _Unrolled(document), {}
    for key in document.data:
        if key != "stages":
            _check_words(document.data[key], (key,), {}, found)
    for i, entry in enumerate(entries):
        at: Keys = ("stages", i)
        places = {keys: place for keys, place in document.where.items() if keys[:2] == at}
        if _is_block(entry):
            _check_block(entry, at, entries, found)
            last = {"last": _add_rounds(entry, at, last, places, found)}
        else:
            _check_words(entry, at, last, found)
            found.add(_filled(entry, last), {(): at}, places)
    document.data["stages"] = found.stages
    document.where = {keys: at for keys, at in document.where.items() if keys[:1] != ("stages",) or len(keys) == 1}
    document.where |= found.where
    document.written = found.written
    return found.faults


def names_a_round(document: Document, text: str) -> bool:
    """Says whether an override is for a stage of one round, such as `stages.dpo-2.ranks=4`, before there are rounds."""
    entries, (section, name, *_) = document.data.get("stages"), (*text.partition("=")[0].split("."), "")
    if section != "stages" or not isinstance(entries, list) or not any(map(_is_block, entries)):
        return False
    return name not in entry_names(entries) and not (name.isdigit() and int(name) < len(entries))


def _is_block(entry: Any) -> bool:
    return isinstance(entry, dict) and not entry.keys().isdisjoint({"repeat", "stages"})


def _check_block(block: dict[str, Any], at: Keys, entries: list[Any], found: _Unrolled) -> None:
    """Notes what is wrong with a block itself; what is wrong with its stages is found when they are unrolled."""
    misplaced = block.keys() & {"command", "ranks", "set", "first"}
    for key in sorted(misplaced):
        found.complain((*at, key), "is a key of a stage, and this is a block; write it in the stages of the block")
    for fault in _faults({key: value for key, value in block.items() if key not in misplaced}):
        keys = (*at, *fault["loc"])
        if fault["type"] == "missing":
            found.complain(keys, "is missing; add it")
        else:
            found.faults.append(explain(_Blocks, found.document, {**fault, "loc": keys}, ()))
    name = block.get("name")
    if isinstance(name, str) and (entry_names(entries).count(name) > 1 or not STAGE_NAME.fullmatch(name)):
        rule = "must be unique, of letters, digits, `-`, `_` and `.`; rename it"
        found.complain((*at, "name"), f"name '{name}': {rule}")


def _faults(block: dict[str, Any]) -> Iterator[Any]:
    """Yields the faults of a block that nobody finds in the stages that it is unrolled to."""
    try:
        RepeatConfig.model_validate_json(json.dumps(block), strict=True)
    except ValidationError as error:
        yield from (f for f in error.errors() if len(f["loc"]) == 1 or f["loc"][2:3] == ("first",))


def _add_rounds(
    block: dict[str, Any], at: Keys, last: dict[str, int], places: Mapping[Keys, str], found: _Unrolled
) -> int:
    """Adds the stages of all rounds, of one where `repeat` is faulty; returns the number of rounds."""
    rounds = 1 if any(f["loc"] == ("repeat",) for f in _faults(block)) else block["repeat"]
    stages = block["stages"] if isinstance(block.get("stages"), list) else []
    before = [stage.get("name") for stage in found.stages if isinstance(stage, dict)]
    for number in range(1, rounds + 1):
        for i, stage in enumerate(stages):
            words = {"round": number, "previous": number - 1, **last}
            _add_stage(stage, (*at, "stages", i), words, before, places, found)
    return rounds


def _add_stage(
    stage: Any, at: Keys, words: dict[str, int], before: list[Any], places: Mapping[Keys, str], found: _Unrolled
) -> None:
    """Adds a stage of a block in one round. `before` are the names of the stages before the block."""
    if _is_block(stage):
        found.complain(at, "is a block in a block; write the stages of its rounds out")
        return
    if not isinstance(stage, dict):
        found.add(stage, {(): at}, places)
        return
    _check_words(stage, at, words, found)
    first, sources = stage.get("first"), {(): at}
    own = _told_apart({key: value for key, value in stage.items() if key != "first"}, at, found)
    if words["round"] == 1:
        if isinstance(first, dict):
            own["set"], sources = merge(own.get("set", {}), first), {(): at, ("set",): (*at, "first")}
        if isinstance(first, dict | None):
            _check_start(own.get("set"), (*at, "set"), before, found)
    found.add(_filled(own, words), sources, places)


def _told_apart(stage: dict[str, Any], at: Keys, found: _Unrolled) -> dict[str, Any]:
    """Returns the stage with a name that tells the rounds apart."""
    name = stage.get("name")
    if not isinstance(name, str) or "{round}" in name:
        return stage
    found.complain((*at, "name"), f"name '{name}': must hold {{round}}, as in '{name}-{{round}}'; rename it")
    return {**stage, "name": f"{name}-{{round}}"}


def _check_start(chosen: Any, at: Keys, before: list[Any], found: _Unrolled) -> None:
    """Notes what the first round would take from a round before it."""
    for keys, text in _nodes(chosen, at):
        path = OF_A_RUN.match(text) if isinstance(text, str) else None
        if path is not None and "{previous}" in path[1] and path[1].replace("{previous}", "0") not in before:
            *sections, key = keys[len(at) :]
            first = "".join(f"{{{section}: " for section in sections) + f"{{{key}: ...}}" + "}" * len(sections)
            found.complain(
                keys,
                f"value '{text}': round 1 has no round before it; say what it takes with `first: {first}` in the "
                f"stage, or call a stage before the block '{path[1].replace('{previous}', '0')}'",
            )


def _check_words(value: Any, at: Keys, words: Mapping[str, int], found: _Unrolled) -> None:
    """Notes the placeholders that mean nothing here: in a block all that are not known, elsewhere those that mean
    something in another place. A text with spaces, such as a prompt, may have braces of its own."""
    for keys, node in _nodes(value, at):
        if isinstance(node, dict) and len(node) == 1 and node.keys() < {*WORDS} and None in node.values():
            found.complain(keys, f'is a section; a placeholder needs quotes: "{{{next(iter(node))}}}"')
        for word in WORD.findall(node) if isinstance(node, str) and not re.search(r"\s", node) else ():
            if word not in ("run", *words) and ("round" in words or word in WORDS):
                found.complain(keys, f"value '{node}': {{{word}}} means nothing here; {_meaning(words)}")


def _meaning(words: Mapping[str, int]) -> str:
    if "round" in words:
        return f"in a block write {', '.join(f'{{{word}}}' for word in ('run', *words))}"
    if "last" in words:
        return "behind a block {last} is its last round, {round} and {previous} are known in it only"
    return "{round} and {previous} are known in a block with `repeat`, {last} behind one"


def _nodes(value: Any, at: Keys) -> Iterator[tuple[Keys, Any]]:
    """Yields (keys, value) of all that is in plain data."""
    yield at, value
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield from _nodes(each, (*at, key))


def _filled(value: Any, words: Mapping[str, int]) -> Any:
    """Returns plain data with the placeholders replaced in every text; one that is a whole text becomes a number."""
    if isinstance(value, dict):
        return {key: _filled(each, words) for key, each in value.items()}
    if isinstance(value, list):
        return [_filled(each, words) for each in value]
    if not isinstance(value, str):
        return value
    if value[:1] == "{" and value[1:-1] in words:
        return words[value[1:-1]]
    return WORD.sub(lambda match: str(words.get(match[1], match[0])), value)
