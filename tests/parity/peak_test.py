"""The peak of a whole training step is the sum that the plan prints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("peak_worker.py")
TOLERANCE = 0.05
SIZES = {"hidden_size": 384, "ffn_size": 1024, "num_heads": 6, "num_kv_heads": 6, "vocab_size": 4096}
SHAPE = {"num_layers": 6, "model": {**SIZES, "max_positions": 1024}, "logprob_chunk_tokens": 512, "tied": False}
ONE = [
    {"zero_stage": 0, "dp_replicate": 1},
    {"zero_stage": 1},
    {"zero_stage": 1, "microbatches": 1},
    {"zero_stage": 1, "remat": "full"},
    {"zero_stage": 1, "remat": "full", "microbatches": 1},
    {"backend": "fsdp"},
    {"backend": "fsdp", "microbatches": 1},
    {"backend": "fsdp", "remat": "full"},
    {"backend": "fsdp", "remat": "selective"},
    {"backend": "fsdp", "reshard": False, "microbatches": 1},
]
TWO = [
    {"dp_shard": 2, "zero_stage": 1},
    {"dp_shard": 2, "zero_stage": 1, "microbatches": 1},
    {"dp_shard": 2, "zero_stage": 3},
    {"dp_shard": 2, "zero_stage": 3, "microbatches": 1},
    {"dp_shard": 2, "zero_stage": 3, "remat": "full"},
    {"dp_shard": 2, "zero_stage": 3, "remat": "full", "microbatches": 1},
    {"tp": 2, "zero_stage": 1},
    {"tp": 2, "zero_stage": 1, "sequence_parallel": False},
    {"tp": 2, "zero_stage": 1, "remat": "full"},
    {"cp": 2, "zero_stage": 1},
    {"pp": 2, "zero_stage": 1},
    {"pp": 2, "zero_stage": 1, "microbatches": 4},
    {"pp": 2, "zero_stage": 1, "microbatches": 4, "remat": "full"},
    {"dp_shard": 2, "backend": "fsdp"},
    {"dp_shard": 2, "backend": "fsdp", "microbatches": 1},
    {"pp": 2, "backend": "fsdp", "microbatches": 4},
]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("ranks", "layouts"), [(1, ONE), (2, TWO)], ids=["one rank", "two ranks"])
def test_the_peak_of_a_step(forked: Callable, ranks: int, layouts: list[dict]) -> None:
    layouts = [{**SHAPE, "tokens": 1024, "microbatches": 2, **layout} for layout in layouts]
    result = forked(ranks, WORKER, json.dumps(layouts), timeout_s=250)
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"layout"')]
    assert len(lines) == len(layouts), result.stdout[-3000:]
    for line in lines:
        own = {key: value for key, value in line["layout"].items() if key not in SHAPE}
        print(f"{line['measured'] / line['planned']:.3f}", line["moment"], own)
    for line in lines:
        assert abs(line["measured"] / line["planned"] - 1) <= TOLERANCE, line
