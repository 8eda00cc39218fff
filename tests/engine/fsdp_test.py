"""FSDP2 beside the parity layouts: when it reduces, what an update that is left out leaves, precisions, resuming."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# Losses of four steps against fp32 ones, relative. Seen: 2e-4 and 4e-5; half an ulp of bf16 is 4e-3, of fp16 5e-4.
ROUNDING = {"bf16": 4e-3, "fp16": 5e-4}


def test_beside_parity(forked: Callable, tmp_path: Path) -> None:
    result = forked(4, HERE / "fsdp_worker.py", tmp_path, timeout_s=200)
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"case"')]
    ranks = {line["case"]: line["ranks"] for line in lines}
    assert len(ranks) == 8, result.stdout[-3000:]
    for case in ("accumulate", "accumulate, pipeline"):
        assert all(r["reductions"] == r["needed"] for r in ranks[case]), ranks[case]
    assert all(r == {"unchanged": True, "same": True} for r in ranks["left out"]), ranks["left out"]
    for precision, half in (("bf16", "torch.bfloat16"), ("fp16", "torch.float16")):
        for rank, r in enumerate(ranks[precision]):
            assert 0 < r["error"] < ROUNDING[precision] and r["steps"] == 4, r
            assert r["hidden"] == ([half] if rank < 2 else [])  # the first stage's
            assert r["masters"] == ["torch.float32"] and r["working"] == [half]
    for r in ranks["overflow"]:
        tries = len(r["scales"])
        assert r["unchanged"] and r["finite"] and 2 < tries < 10, r
        assert r["scales"] == [24 - i for i in range(tries)] and r["skipped"] == [1] * (tries - 1) + [0], r
        assert [norm == "nan" for norm in r["norms"]] == [True] * (tries - 1) + [False], r
    assert all(r["same"] for case in ("resumed", "resumed, copies") for r in ranks[case])
    assert [r["empty_pieces"] for r in ranks["resumed"]] == [0, 0, 4, 4]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled(forked: Callable) -> None:
    layouts = [
        {"backend": "fsdp", "tp": 2, "dp_shard": 2, "compile": True},
        {"backend": "fsdp", "dp_replicate": 2, "dp_shard": 2, "compile": True, "remat": "full", "grad_clip": 0},
        {"backend": "fsdp", "pp": 2, "dp_shard": 2, "compile": True, "tied": False, "reshard": False},
    ]
    result = forked(4, HERE.parent / "parity" / "layouts_worker.py", json.dumps(layouts), timeout_s=800)
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"layout"')]
    assert len(lines) == len(layouts), result.stdout[-3000:]
    for line in lines:
        assert max(line[measure] for measure in ("loss", "norm", "grad", "weight", "score")) <= 1e-5, line
