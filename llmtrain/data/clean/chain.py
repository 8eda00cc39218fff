"""Lists the cleaning steps in the order in which they run, and which kinds of documents each of them sees."""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

from llmtrain.config.clean import CleanConfig
from llmtrain.data.clean.files import RankWriter
from llmtrain.data.clean.step import Check, Step


class Listed(NamedTuple):
    """Names a step: its key in `data.clean`, its module here with a function `make(settings)`, and what it sees."""

    name: str
    kinds: str


STEPS = (
    Listed("url", "web"),
    Listed("extract", "web"),
    Listed("repair", "web prose code dialogue"),
    Listed("language", "web prose dialogue"),
    Listed("repetition", "web prose"),
    Listed("quality", "web prose"),
    Listed("c4", "web"),
    Listed("fineweb", "web"),
    Listed("code", "code"),
    Listed("math", "web prose"),
    Listed("classifier", "web prose"),
    Listed("toxicity", "web prose dialogue"),
    Listed("contamination", "web prose code dialogue"),
    Listed("pii", "web prose code dialogue"),
)


def chain(clean: CleanConfig, kind: str, dropped: str | None) -> list[Step]:
    """Returns the steps that documents of a kind go through, those that are off left out. Examples of what each drops
    are written into the folder `dropped`/STEP."""
    chosen = [(step, getattr(clean, step.name)) for step in STEPS if kind in step.kinds.split()]
    return [
        Step(
            step.name,
            make,
            (step.name, settings, clean.words),
            dropped and RankWriter(f"{dropped}/{step.name}"),
            clean.examples,
        )
        for step, settings in chosen
        if settings is not None
    ]


def make(named: tuple[str, Any, Any]) -> Check:
    """Returns the check of a step from its module, which is imported in the worker."""
    name, settings, words = named
    return import_module(f"llmtrain.data.clean.{name}").make(settings, words)
