"""Both engines on any mesh against one plain process: loss, every gradient, norm, weights after 5 steps, scores."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from ctypes.util import find_library
from pathlib import Path

import pytest

from tests.parity.matrix import at_least, covering, generate, layout_of, ranks

WORKER = Path(__file__).with_name("layouts_worker.py")
# fp32 rounding: sums over tokens, ranks and vocabulary run in another order than in one process. Seen: 4e-6.
TOLERANCE = 1e-5

# Cases that went wrong once or hide what others show; the rest is drawn, see matrix.py.
PINNED = [
    {"pp": 2, "tp": 2, "zero_stage": 1, "grad_clip": 0},  # clipping would hide a gradient of the wrong size
    {"pp": 2, "dp_shard": 2, "zero_stage": 2, "num_layers": 3},  # unequal stages, tied
    {"pp": 2, "dp_shard": 2, "backend": "fsdp", "num_layers": 3, "tied": False},
    {"pp": 4, "zero_stage": 3},
    {"tp": 4, "backend": "fsdp"},  # nothing to shard
    {"cp": 4, "zero_stage": 1, "context": "ring"},
]
EIGHT = [
    {"pp": 2, "tp": 2, "dp_shard": 2, "zero_stage": 3},
    {"pp": 2, "tp": 2, "cp": 2, "backend": "fsdp", "context": "ring"},
]


def starts(layouts: list[dict]) -> Iterator[tuple[int, list[dict]]]:
    """(processes, layouts that share them). Not too many: the groups of a layout keep their threads to the end."""
    for size in sorted({ranks(layout) for layout in layouts}):
        alike = [layout for layout in layouts if ranks(layout) == size]
        yield from ((size, alike[i : i + 14]) for i in range(0, len(alike), 14))


def check(run: Callable, ranks: int, layouts: list[dict], timeout_s: float) -> None:
    result = run(ranks, WORKER, json.dumps(layouts), timeout_s=timeout_s)
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"layout"')]
    assert len(lines) == len(layouts), result.stdout[-3000:]
    for line in lines:
        print(line)
        assert "error" not in line, line
        for measure in ("loss", "norm", "grad", "weight", "score"):
            assert line[measure] <= TOLERANCE, line


def test_every_feature(torchrun: Callable) -> None:
    """Few drawn layouts that together show every feature but compilation, which takes its time."""
    drawn = [layout_of(names) for names in covering(generate(max_ranks=4), without=frozenset({"compile"}))]
    for size, layouts in starts([*PINNED, *drawn]):
        check(torchrun, size, layouts, timeout_s=300)


def test_eight_ranks(torchrun: Callable) -> None:
    check(torchrun, 8, EIGHT, timeout_s=200)


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.skipif(find_library("aio") is None, reason="NVMe offload needs libaio-dev")
def test_nvme(torchrun: Callable, tmp_path: Path) -> None:
    """DeepSpeed compiles its disk reader first, which takes minutes."""
    layout = {"dp_shard": 2, "zero_stage": 3, "offload": "nvme", "offload_path": str(tmp_path)}
    check(torchrun, 2, [layout], timeout_s=2000)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_matrix(torchrun: Callable) -> None:
    """Every pair of features that goes together, several times: see docs/parallelism.md."""
    drawn = [layout_of(names) for names in at_least(64)]
    for size, layouts in starts(drawn):
        check(torchrun, size, layouts, timeout_s=3600)
