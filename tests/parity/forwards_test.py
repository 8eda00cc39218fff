"""Bytes counted on every axis while a model scores, and while the generator gets new weights, are those of the formula;
exactly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.parity.traffic_test import ADAPTED, LARGE, MLA, MOE, ODD

WORKER = Path(__file__).with_name("forwards_worker.py")

# New weights under FSDP2 come first, each on a mesh of its own: torch takes the groups of an equal, earlier mesh.
QUICK = [
    {"what": "sync", "dp_shard": 4, "backend": "fsdp", **ODD},
    {"what": "sync", "pp": 2, "tp": 2, "zero_stage": 1, "num_layers": 2},
    {"what": "frozen", "pp": 2, "tp": 2, "zero_stage": 1, "num_layers": 2},
    {"what": "score", "pp": 2, "cp": 2, "zero_stage": 1, "context": "ring", "num_layers": 2},
]
MORE = [
    {"what": "sync", "dp_replicate": 2, "dp_shard": 2, "backend": "fsdp", "precision": "bf16"},
    {"what": "sync", "pp": 2, "dp_shard": 2, "backend": "fsdp", "tied": False},
    {"what": "sync", "dp_shard": 4, "ep": 4, "backend": "fsdp", **MOE},
    {"what": "sync", "tp": 2, "dp_shard": 2, "backend": "fsdp", **ADAPTED},
    {"what": "sync", "dp_shard": 4, "ep": 2, "zero_stage": 1, **MOE},
    {"what": "sync", "pp": 2, "tp": 2, "zero_stage": 1, **ADAPTED},
    {"what": "frozen", "dp_replicate": 2, "dp_shard": 2, "backend": "fsdp", "microbatches": 3, **ODD},
    {"what": "frozen", "pp": 2, "dp_shard": 2, "zero_stage": 1, "microbatches": 4, "precision": "bf16"},
    {"what": "frozen", "cp": 2, "tp": 2, "zero_stage": 1, "context": "allgather", "sequence_parallel": False},
    {"what": "frozen", "cp": 2, "dp_shard": 2, "zero_stage": 1, "context": "alltoall", "model": MLA},
    {"what": "frozen", "dp_shard": 4, "ep": 2, "zero_stage": 1, **MOE},
    {"what": "score", "dp_shard": 4, "backend": "fsdp", "microbatches": 3},
    {"what": "score", "dp_shard": 4, "backend": "fsdp", "reshard": False, "microbatches": 3},
    {"what": "score", "pp": 2, "dp_shard": 2, "backend": "fsdp", "microbatches": 4},
    {"what": "score", "pp": 2, "dp_shard": 2, "zero_stage": 1, "schedule": "zbv", "virtual_stages": 2},
    {"what": "score", "dp_shard": 4, "zero_stage": 1, "remat": "full"},
    {"what": "score", "tp": 4, "zero_stage": 1, "remat": "full"},
    {"what": "score", "dp_shard": 4, "ep": 2, "backend": "fsdp", **MOE},
    {"what": "score", "dp_shard": 2, "cp": 2, "ep": 2, "zero_stage": 2, "context": "alltoall", **MOE},
    {"what": "score", "pp": 2, "tp": 2, "zero_stage": 1, **ADAPTED},
    {"what": "score", "dp_shard": 4, "zero_stage": 3, "microbatches": 3, **LARGE},
    {"what": "score", "dp_shard": 4, "zero_stage": 3, "microbatches": 3, "tied": False, **LARGE},
    {"what": "sync", "dp_shard": 4, "zero_stage": 3, "precision": "bf16", **LARGE},
    {"what": "sync", "tp": 2, "dp_shard": 2, "zero_stage": 3, **LARGE},
    # these change DeepSpeed's setting: the last ones
    {"what": "score", "dp_shard": 4, "zero_stage": 3, "microbatches": 3, "reuse": 900_000, **LARGE},
    {"what": "score", "dp_shard": 4, "zero_stage": 3, "microbatches": 3, "tied": False, "reuse": 900_000, **LARGE},
    {"what": "sync", "dp_shard": 4, "zero_stage": 3, "reuse": 900_000, **LARGE},
]


@pytest.mark.parametrize("layouts", [QUICK, pytest.param(MORE, marks=pytest.mark.slow)], ids=["quick", "more"])
def test_counted_bytes_are_those_of_the_formula(forked: Callable, layouts: list[dict]) -> None:
    result = forked(4, WORKER, json.dumps(layouts), timeout_s=250)
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"layout"')]
    for line in lines:
        print(line["layout"], *line["items"], sep="\n    ")
        assert line["counted"] == line["formula"], line
    assert [line["layout"] for line in lines] == layouts, result.stdout[-3000:]
