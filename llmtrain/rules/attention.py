"""Checks attention backends. Each rule yields lines with value, rule and remedy."""

from __future__ import annotations

from collections.abc import Iterator

from llmtrain.arch.attention import flash_faults, flex_faults, has_flash
from llmtrain.rules.case import Case, Rules, here, plans, trains


def _backend(case: Case) -> Iterator[str]:
    backend, precision, p = case.config.engine.attention, case.config.engine.precision, case.config.parallel
    if backend not in ("flex", "flash"):
        return
    key = f"engine.attention={backend}"
    if p.cp > 1 and p.context == "ring":
        rule = "not with parallel.context=ring, which computes tiles by itself"
        yield f"{key}: {rule}; set sdpa or auto, or context to alltoall or allgather"
    if case.model:
        faults = flex_faults(case.model) if backend == "flex" else flash_faults(case.model, precision)
        yield from (f"{key}: {fault}" for fault in faults)
    if backend == "flash" and case.recipe is not None and case.recipe.branches:
        rule = f"not in {case.command}, its masks cannot say that samples share their prompt"
        yield f"{key}: {rule}; set flex, sdpa or auto"


def _package(case: Case) -> Iterator[str]:
    if case.config.engine.attention == "flash" and not has_flash():
        yield "engine.attention=flash: needs the package flash-attn, it is not installed; install it, or set auto"


ATTENTION_RULES: Rules = ((plans, _backend),)
PACKAGE_RULES: Rules = ((here(trains), _package),)  # of the machine, not of the document
