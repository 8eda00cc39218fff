"""A checkpoint of any layout, loaded on any other: the next losses and norms are those of never having stopped."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.parity.experts_test import SIGMOID
from tests.parity.matrix import ranks, runs_here

WORKER = Path(__file__).with_name("transfer_worker.py")
# Layouts sum in different orders; five AdamW steps let a rounding of 1e-7 grow. Seen: 2e-6.
TOLERANCE = 1e-5

TWO_EACH = {"virtual_stages": 2}
LAYOUTS = [
    {"zero_stage": 0},
    {"backend": "fsdp"},
    {"dp_shard": 2, "zero_stage": 3},
    {"tp": 2, "zero_stage": 1},
    {"pp": 2, "backend": "fsdp"},
    {"pp": 2, "tp": 2, "zero_stage": 1},
    {"dp_shard": 2, "tp": 2, "backend": "fsdp"},
    {"dp_replicate": 2, "dp_shard": 2, "backend": "fsdp"},
    {"dp_shard": 4, "zero_stage": 2, "offload": "optimizer"},
    {"cp": 2, "dp_shard": 2, "zero_stage": 3},
    {"pp": 2, "dp_shard": 2, "virtual_stages": 2, "schedule": "interleaved_1f1b", "zero_stage": 1},
    {"dp_shard": 6, "zero_stage": 1},
    {"pp": 3, "dp_shard": 2, "zero_stage": 1},
    {"dp_shard": 3, "tp": 2, "backend": "fsdp"},
    {"pp": 2, "tp": 2, "dp_shard": 2, "zero_stage": 3},
    {"dp_shard": 8, "backend": "fsdp"},
    {"pp": 2, "cp": 2, "dp_shard": 2, "backend": "fsdp"},
    {"pp": 2, "schedule": "zbv", **TWO_EACH, "zero_stage": 1},  # both ends of a tied embedding on one rank
    {"pp": 2, "schedule": "zbv", **TWO_EACH, "backend": "fsdp", "reshard": False},
    {"pp": 2, "schedule": "interleaved_zero_bubble", **TWO_EACH, "zero_stage": 2},
    {"cp": 2, "zero_stage": 3, "offload": "params"},
]
MUON = [  # its state is of its own kind, and goes to Muon only
    {"pp": 2, "schedule": "zbv", **TWO_EACH, "backend": "fsdp", "reshard": False},
    {"tp": 2, "backend": "fsdp"},
    {"dp_shard": 2, "zero_stage": 0},
    {"tp": 2, "cp": 2, "zero_stage": 0},
    {"dp_shard": 3, "backend": "fsdp"},
    {"dp_shard": 2, "tp": 2, "zero_stage": 1},
]
EXPERTS = [
    {"dp_shard": 4, "ep": 2, "zero_stage": 1, "model": SIGMOID},
    {"dp_shard": 4, "ep": 4, "backend": "fsdp", "model": SIGMOID},
    {"pp": 2, "tp": 2, "zero_stage": 2, "model": SIGMOID},
    {"dp_shard": 2, "tp": 2, "ep": 2, "zero_stage": 3, "model": SIGMOID},
]
THREE_AFTER = {"after": 3}  # the first loss shows the weights, the second the moments, the third what was made of them
QUICK = [(3, 4), (4, 3), (2, 3), (2, 2), (4, 4)]  # tensor to pipeline parallel, FSDP2 to ZeRO and back, and in place


def random_pairs(count: int, seed: int = 0) -> list[tuple[int, int]]:
    """Different layouts, each once in place, and 8 ranks to 1 to 6 among them."""
    eight, one, six = 14, 0, 11
    pairs = dict.fromkeys([(eight, one), (one, six), *((i, i) for i in range(len(LAYOUTS)))])
    rng = random.Random(seed)
    while len(pairs) < count:
        pairs[rng.randrange(len(LAYOUTS)), rng.randrange(len(LAYOUTS))] = None
    return list(pairs)


def check(
    run: Callable, directory: Path, pairs: list[tuple[int, int]], timeout_s: float, layouts: Sequence[dict] = LAYOUTS
) -> None:
    pairs = [pair for pair in pairs if all(runs_here(layouts[i]) for i in pair)]
    saves, loads = defaultdict(list), defaultdict(list)
    for saved in sorted({saved for saved, _ in pairs}):
        saves[ranks(layouts[saved])].append((saved, layouts[saved]))
    for saved, loaded in pairs:
        loads[ranks(layouts[loaded])].append((saved, loaded, layouts[loaded]))
    for size, jobs in saves.items():
        result = run(size, WORKER, "save", directory, json.dumps(jobs), timeout_s=timeout_s)
        assert result.returncode == 0, result.stdout[-3000:]
    lines = []
    for size, jobs in loads.items():
        result = run(size, WORKER, "load", directory, json.dumps(jobs), timeout_s=timeout_s)
        lines += [json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"saved"')]
        assert result.returncode == 0, result.stdout[-3000:]
    assert sorted((line["saved"], line["loaded"]) for line in lines) == sorted(pairs)
    for line in lines:
        print(line)
        assert line["error"] <= (0 if line["saved"] == line["loaded"] else TOLERANCE), line


def test_between_engines_and_axes(forked: Callable, tmp_path: Path) -> None:
    layouts = [{**layout, **THREE_AFTER, "num_layers": 2} for layout in LAYOUTS[:5]]
    check(forked, tmp_path, QUICK, timeout_s=150, layouts=layouts)


def test_experts_and_biases_of_routers(forked: Callable, tmp_path: Path) -> None:
    layouts = [{**layout, **THREE_AFTER} for layout in EXPERTS]
    check(forked, tmp_path, [(0, 1), (1, 2), (0, 0)], timeout_s=200, layouts=layouts)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_pair_with_experts(forked: Callable, tmp_path: Path) -> None:
    check(forked, tmp_path, [(i, j) for i in range(4) for j in range(4)], timeout_s=400, layouts=EXPERTS)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_fifty_pairs(forked: Callable, tmp_path: Path) -> None:
    check(forked, tmp_path, random_pairs(50), timeout_s=600)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_muon(forked: Callable, tmp_path: Path) -> None:
    layouts = [{"optimizer": "muon", **layout} for layout in MUON]
    pairs = [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 0), *((i, i) for i in range(len(layouts)))]
    check(forked, tmp_path, pairs, timeout_s=300, layouts=layouts)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_muon_of_experts(forked: Callable, tmp_path: Path) -> None:
    layouts = [{"optimizer": "muon", **layout} for layout in EXPERTS[:3]]
    check(forked, tmp_path, [(0, 1), (1, 2), (2, 0), (0, 0), (1, 1)], timeout_s=300, layouts=layouts)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_scalar_head(forked: Callable, tmp_path: Path) -> None:
    """Its one row is cut along the columns under tp, and in pieces of which some are empty by FSDP2."""
    scalar = {"task": "values", "tied": False, "model": {"head": "scalar"}, "num_layers": 2}
    pairs = [(3, 6), (6, 4), (4, 2), (2, 3), (5, 1), (1, 5), *((i, i) for i in (2, 3, 4, 5, 6))]
    check(forked, tmp_path, pairs, timeout_s=200, layouts=[{**layout, **scalar} for layout in LAYOUTS[:7]])
