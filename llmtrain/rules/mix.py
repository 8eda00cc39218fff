"""Checks how text is mixed and packed into rows. Each rule yields lines with value, rule and remedy."""

from __future__ import annotations

from collections.abc import Iterator

from llmtrain.config.data import DataConfig
from llmtrain.config.ramp import phase_at
from llmtrain.config.recipes import names_of
from llmtrain.config.schema import TrainConfig
from llmtrain.rules.case import Case, Rules, plans, trains, tunes


def _anneal(case: Case) -> Iterator[str]:
    data = case.config.data
    names = [source.name for source in data.sources]
    for at, entry in enumerate(data.anneal):
        key = f"data.anneal.{at}"
        if (entry.from_tokens is None) == (entry.from_step is None):
            yield f"{key}: needs one of from_tokens and from_step; set one, and remove the other"
        if names and (unknown := sorted(entry.weights.keys() - set(names))):
            yield f"{key}.weights.{unknown[0]}: is no source, those are {', '.join(names)}; correct the name"
        if negative := [name for name, weight in entry.weights.items() if weight < 0]:
            yield f"{key}.weights.{negative[0]}={entry.weights[negative[0]]:g}: must not be negative; raise it"
        elif not any(entry.weights.values()):
            yield f"{key}.weights: must give at least one source a weight above 0; add one"
    starts = _starts(data, case.config.train)
    if starts != sorted(set(starts)):
        yield f"data.anneal: begins at the tokens {starts}: must rise from entry to entry; sort them"
    if data.anneal and tunes(case):
        have = names_of(lambda recipe: recipe.packs_text)
        yield f"data.anneal: must be empty, only {have} anneals; remove it from {case.command}"


def _weights(case: Case) -> Iterator[str]:
    data = case.config.data
    if tunes(case) and not data.replay_seqs:
        return  # it reads no text
    if data.sources and not any(source.weight for source in data.sources):
        yield "data.sources: must give at least one source a weight above 0; raise one"
    later = {name for entry in data.anneal for name, weight in entry.weights.items() if weight}
    for source in data.sources:
        if not source.weight and source.name not in later:
            yield (
                f"data.sources.{source.name}.weight=0: must be above 0, no entry of data.anneal gives it a share; "
                "raise it, or remove the source"
            )


def _starts(data: DataConfig, train: TrainConfig) -> list[int]:
    """Returns the tokens of the run before each entry of `data.anneal` holds."""
    steps = (entry.from_step or 0 for entry in data.anneal)
    return [
        entry.from_tokens or phase_at(train, step).token_at(step)
        for entry, step in zip(data.anneal, steps, strict=True)
    ]


def _blocks(case: Case) -> Iterator[str]:
    data = case.config.data
    used = {
        "data.temperature": data.temperature is not None,
        "data.anneal": bool(data.anneal),
        "max_epochs of a source": any(source.max_epochs is not None for source in data.sources),
    }
    if data.mix == "blocks" and any(used.values()):
        found = next(key for key, is_used in used.items() if is_used)
        yield f"data.mix=blocks: not with {found}, which changes shares in the midst of a block; use even"


def _languages(case: Case) -> Iterator[str]:
    named = [source for source in case.config.data.sources if source.language is not None]
    if case.config.data.temperature is None and named:
        yield (
            f"data.sources.{named[0].name}.language={named[0].language}: only data.temperature asks for it; set that, "
            "or remove it"
        )


def _packing(case: Case) -> Iterator[str]:
    data = case.config.data
    if data.packing == "best_fit" and not data.mask_documents:
        yield (
            "data.mask_documents=false: not with data.packing=best_fit, whose rows have no end of text between "
            "documents; use data.packing=cut, or mask them"
        )


MIX_RULES: Rules = ((plans, _anneal), (trains, _blocks), (trains, _weights), (trains, _languages), (trains, _packing))
