"""What the benchmark of attention backends measures and how it judges."""

from __future__ import annotations

import pytest
import torch

from benchmarks.attention import KINDS, WAYS, Case, auto_choice, contestant, judged
from benchmarks.standings import check_same_work


class Once:
    """Stands in for `common.Turns`: one piece of work."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def wait(self) -> bool:
        return not self.values

    def count_memory(self) -> None:
        """Of no interest here."""

    def done(self, value: float) -> None:
        self.values.append(value)


@pytest.mark.parametrize("kind", KINDS)
def test_contestants_do_the_same_work(kind: str) -> None:
    case, runs = Case(kind, 64, 2, "float32"), {}
    for name in ("sdpa", *WAYS):
        turns = Once()
        contestant(turns, case, "cpu", name)
        runs[name] = [{"values": turns.values}]
    check_same_work(runs, "sdpa", 1e-5)


def test_documents_restart() -> None:
    segments, ends, positions = Case("documents", 2048, 2, "float32").ids()
    assert ends is None and segments.max() > 1 and (segments.diff() >= 0).all()
    assert torch.equal(positions[:, 1:] == 0, segments.diff() > 0) and (positions[:, 0] == 0).all()
    _, ends, _ = Case("branches", 64, 1, "float32").ids()
    assert ends[0].unique(return_counts=True)[1].tolist() == [4] * 7 + [32 + 4]


def test_the_verdict() -> None:
    """auto's choice against the fastest, by medians within rounds."""
    case = Case("documents", 1024, 1, "bfloat16")
    turns = {"sdpa": 2.0, "flex": 1.0}
    runs = {n: [{"wall_s": s, "cpu_s": s, "peak_bytes": 1, "values": [1.0]}] * 3 for n, s in turns.items()}
    good = judged(case, runs, auto_choice(case, ("sdpa", "flex")), 1)
    assert (good["fastest"], good["auto"], good["met"]) == ("flex", "flex", True)
    bad = judged(case, runs, auto_choice(case, ("sdpa",)), 1)
    assert (bad["auto_against_fastest"], bad["met"]) == (0.5, False) and bad["results"]["flex"]["ratio"] == 2.0
    assert auto_choice(Case("branches", 2048, 1, "bfloat16"), ("sdpa", "flex", "flash")) == "flex"
