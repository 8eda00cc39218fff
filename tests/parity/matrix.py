"""Draws layouts from the features of docs/parallelism.py until every pair that is allowed stands in one of them."""

from __future__ import annotations

import importlib.util
import math
import random
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from types import ModuleType

from llmtrain.config.machine import torch_version
from llmtrain.rules.layout import ZERO_BUBBLE_TORCH

MAX_RANKS = 8
TRIES = 12  # random completions of a pair, of which the one with the most new pairs is kept
SHAPE = {"model.num_layers": 4, "model.num_heads": 4, "model.num_kv_heads": 2, "model.hidden_size": 32}
NOT_FP32 = {
    "bf16",
    "fp16",
    "fp8",
    "offload NVMe",
}  # compared otherwise: rounding hides an error, and NVMe needs a library


def _load() -> ModuleType:
    path = Path(__file__).parents[2] / "docs" / "parallelism.py"
    spec = importlib.util.spec_from_file_location("parallelism", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def runs_here(layout: dict) -> bool:
    """Tells whether the features have no schedule that only a later torch can compute."""
    return torch_version() >= ZERO_BUBBLE_TORCH or layout.get("schedule") not in ("interleaved_zero_bubble", "zbv")


parallelism = _load()
FEATURES = {
    name: feature
    for name, feature in parallelism.FEATURES.items()
    if name not in NOT_FP32 and runs_here({"schedule": feature.get("parallel.schedule")})
}


def keys(names: frozenset[str]) -> dict | None:
    """Returns the features' configuration keys on the shape that the worker trains; None where two exclude each
    other."""
    both = parallelism.merged(SHAPE, *(FEATURES[name] for name in sorted(names)))
    return None if both is None or "engine.backend" not in both else both


def ranks(layout: dict) -> int:
    """Returns the number of processes that a layout needs."""
    return math.prod(layout.get(axis, 1) for axis in ("pp", "dp_replicate", "dp_shard", "cp", "tp"))


def layout_of(names: frozenset[str]) -> dict:
    """Returns what tests/parity/layouts_worker.py is told."""
    renamed = {"model.tie_embeddings": "tied", "optim.name": "optimizer"}
    chosen = {key: value for key, value in keys(names).items() if key not in SHAPE}
    return {renamed.get(key, key.partition(".")[2]): value for key, value in chosen.items()}


def allowed(names: frozenset[str], max_ranks: int) -> bool:
    """Tells whether a set means something, needs 2 to `max_ranks` processes and passes the rules."""
    both = keys(names)
    most = min(max_ranks, 4) if "compile" in names else max_ranks  # every rank compiles: 8 take minutes a layout
    return both is not None and 2 <= ranks(layout_of(names)) <= most and not parallelism.refusals(both)


def completions(pair: frozenset[str], rng: random.Random, max_ranks: int) -> Iterator[frozenset[str]]:
    """Yields allowed sets of features around a pair, as large as they get in a random order, on few ranks or many."""
    engines = [name for name in sorted(FEATURES) if "engine.backend" in FEATURES[name]]
    for _ in range(TRIES):
        limit = rng.choice([n for n in (4, 8) if n <= max_ranks])
        names = pair if _engine(pair) else pair | {rng.choice(engines)}
        for name in rng.sample(sorted(FEATURES), len(FEATURES)):
            larger = names | {name}
            if keys(larger) is not None and (ranks(layout_of(larger)) == 1 or allowed(larger, limit)):
                names = larger if rng.random() < 0.7 else names
        if allowed(names, limit):
            yield names


def _engine(names: frozenset[str]) -> bool:
    return any("engine.backend" in FEATURES[name] for name in names)


def generate(seed: int) -> list[frozenset[str]]:
    """Returns sets of features that together hold every pair that goes together at all."""
    rng = random.Random(seed)
    missing = {frozenset(pair) for pair in combinations(FEATURES, 2)}
    chosen: list[frozenset[str]] = []
    for pair in sorted(missing, key=sorted):
        if pair not in missing:
            continue
        found = list(completions(pair, rng, MAX_RANKS))
        if found:
            best = max(found, key=lambda names: len(missing & _pairs(names)))
            chosen.append(best)
            missing -= _pairs(best)
    return chosen


def around_each(max_ranks: int, seed: int = 0) -> list[frozenset[str]]:
    """Returns sets of features around every single one: quicker to draw than those around every pair."""
    rng = random.Random(seed)
    return [names for feature in sorted(FEATURES) for names in completions(frozenset({feature}), rng, max_ranks)]


def at_least(count: int) -> list[frozenset[str]]:
    """Returns as many layouts, or more: several covers of all pairs, each drawn anew."""
    chosen: dict[frozenset[str], None] = {}
    for seed in range(count):
        chosen |= dict.fromkeys(generate(seed))
        if len(chosen) >= count:
            break
    return list(chosen)


def _pairs(names: frozenset[str]) -> set[frozenset[str]]:
    return {frozenset(pair) for pair in combinations(names, 2)}


def covering(chosen: list[frozenset[str]], without: frozenset[str]) -> list[frozenset[str]]:
    """Returns few of them that together show every feature but those `without`, the cheap ones first."""
    missing, kept = set(FEATURES) - without, []
    candidates = [names for names in chosen if not names & without]
    while gain := max((len(missing & names) for names in candidates), default=0):
        best = min((n for n in candidates if len(missing & n) == gain), key=lambda n: (ranks(layout_of(n)), sorted(n)))
        kept.append(best)
        missing -= best
    assert not missing, f"no set shows {missing}"
    return kept
