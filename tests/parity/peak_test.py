"""The peak of a whole training step is the sum that the plan prints, where a step has several microbatches."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("peak_worker.py")
TOLERANCE = 0.05
SIZES = {"hidden_size": 384, "ffn_size": 1024, "num_heads": 6, "num_kv_heads": 6, "vocab_size": 4096}
SHAPE = {"num_layers": 6, "model": {**SIZES, "max_positions": 1024}, "logprob_chunk_tokens": 512, "tied": False}
LAYOUTS = [
    {"backend": "deepspeed", "zero_stage": 0, "dp_replicate": 1},
    {"backend": "deepspeed", "zero_stage": 1},
    {"backend": "deepspeed", "zero_stage": 1, "remat": "full"},
    {"backend": "fsdp"},
    {"backend": "fsdp", "remat": "full"},
    {"backend": "fsdp", "remat": "selective"},
]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_peak_of_one_rank(forked: Callable) -> None:
    layouts = [{**SHAPE, "tokens": 1024, "microbatches": 2, **layout} for layout in LAYOUTS]
    result = forked(1, WORKER, json.dumps(layouts), timeout_s=250)
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"layout"')]
    assert len(lines) == len(layouts), result.stdout[-3000:]
    for line in lines:
        print(f"{line['measured'] / line['planned']:.3f}", line)
        assert abs(line["measured"] / line["planned"] - 1) <= TOLERANCE, line
