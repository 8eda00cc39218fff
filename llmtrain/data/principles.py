"""Reads the principles of a constitution (arXiv 2212.08073): what answers are criticised for and compared by."""

from __future__ import annotations

import random
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from llmtrain.data.faults import Faults


@dataclass(frozen=True)
class Principle:
    """Holds one principle.

    Example: Principle("clarity", "What is confused in your last answer?", "Write it again, clearly.",
                       "Which of the two answers is clearer?")
    """

    name: str
    critique: str  # asks for a critique of the last answer
    revision: str  # asks for the answer again, without what was criticised
    question: str  # asks which of two answers is better


FIELDS = tuple(field.name for field in fields(Principle))


def read_principles(path: str) -> list[Principle]:
    """Returns the principles of a YAML file. Raises ValueError with all faults: an entry that lacks a text, or has
    another key, a name that comes twice, or no entry at all."""
    try:
        entries = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: is no YAML ({' '.join(str(error).split())}); mend it") from None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: must be a list of principles, each with {', '.join(FIELDS)}; write at least one")
    faults, found = Faults(path), []
    for number, entry in enumerate(entries, 1):
        if fault := fault_of(entry, [principle.name for principle in found]):
            faults.add(f"{path}: principle {number}", fault)
        else:
            found.append(Principle(**{name: entry[name].strip() for name in FIELDS}))
    faults.raise_any()
    return found


def fault_of(entry: Any, names: list[str]) -> str | None:
    """Returns what is wrong with an entry, None if nothing is."""
    if not isinstance(entry, dict):
        return f"must have {', '.join(FIELDS)}; write them"
    if unknown := [name for name in entry if name not in FIELDS]:
        return f"unknown key {unknown[0]!r}; remove it, or rename it to one of {', '.join(FIELDS)}"
    if missing := [name for name in FIELDS if not isinstance(entry.get(name), str) or not entry[name].strip()]:
        return f"{missing[0]}: must be a text; write it"
    return f"name {entry['name']!r} comes twice; rename one" if entry["name"].strip() in names else None


def drawn(principles: list[Principle], seed: int, purpose: str) -> Principle:
    """Returns a principle at random, the same for the same seed and purpose."""
    return random.Random(f"{seed}/{purpose}").choice(principles)
