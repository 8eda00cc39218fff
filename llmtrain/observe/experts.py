"""Summarises over all layers how evenly experts are loaded, from the records of metrics.jsonl, for plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from llmtrain.observe.plots import Panel

EXPERTS: tuple[Panel, ...] = (
    ("Tokens of the busiest expert, 1 = even", {"load_max_mean": "mean of layers", "load_max_worst": "worst layer"}),
    ("Entropy of the load, 1 = even", {"load_entropy_mean": "mean of layers", "load_entropy_worst": "worst layer"}),
    ("Share of choices that no expert computed", {"load_dropped_worst": "worst layer"}),
    ("Auxiliary losses", {"aux_loss": "balance", "z_loss": "router's z"}),
)
WORST = {"load_max": max, "load_entropy": min, "load_dropped": max}


def over_layers(record: Mapping[str, Any]) -> dict[str, float]:
    """Returns the mean and the worst over the layers of each measure that the record holds per layer.

    Example: {"load_max.0": 1.5, "load_max.1": 2.5} -> {"load_max_mean": 2.0, "load_max_worst": 2.5}
    """
    found: dict[str, float] = {}
    for measure, worst in WORST.items():
        values = [v for key, v in record.items() if key.startswith(f"{measure}.") and v is not None]
        if values:
            found |= {f"{measure}_mean": fmean(values), f"{measure}_worst": worst(values)}
    return found


def expert_records(metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the steps at which loads were recorded, with the keys that `EXPERTS` plots; empty without experts."""
    losses = ("aux_loss", "z_loss")
    return [
        {"step": record["step"], **found, **{name: record[name] for name in losses if name in record}}
        for record in metrics
        if (found := over_layers(record))
    ]
