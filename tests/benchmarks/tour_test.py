from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.tour import curves, gather, main, table


def run(directory: Path, labels: dict[str, float], samples: int = 0) -> Path:
    """A run directory: one stage that sampled, and its evaluations."""
    (directory / "raft").mkdir(parents=True)
    (directory / "raft" / "metrics.jsonl").write_text(
        json.dumps({"step": 1, "samples": samples, "reward_mean": samples / 1000}) + "\n"
    )
    (directory / "raft" / "done.json").write_text('{"cpu_s": 12.0, "made_from": []}')
    for label, score in labels.items():
        stage = directory / f"eval-{label}"
        stage.mkdir()
        (stage / "eval.json").write_text(json.dumps({"label": label, "pass@1": score, "maj@8": 0.5}))
        (stage / "done.json").write_text(json.dumps({"cpu_s": 9.0, "made_from": [label] if label != "start" else []}))
    return directory


def test_a_table_over_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [run(tmp_path / str(i), {"raft": 0.6 + i / 100, "start": 0.4}, 100 + i) for i in range(3)]
    seeds = gather([str(path) for path in runs])
    assert seeds["raft"]["pass@1"] == [0.6, 0.61, 0.62] and seeds["raft"]["samples"] == [100, 101, 102]
    assert seeds["raft"]["cpu_s"] == [12.0] * 3 and seeds["start"]["samples"] == [0, 0, 0]
    lines = table(seeds).splitlines()
    assert lines[2] == "| start | 0.400 | – | 0.500 | – | – | – | 0 | 0 |"
    assert lines[3] == "| raft | 0.610 (0.600–0.620) | – | 0.500 | – | – | – | 101 (100–102) | 12 |"
    out = tmp_path / "tour.json"
    main([*map(str, runs), "--out", str(out)])
    assert capsys.readouterr().out.splitlines()[3] == lines[3]
    assert curves([str(path) for path in runs]) == {"raft": [(101, pytest.approx(0.101))]}
    assert (tmp_path / "tour_curves.png").stat().st_size > 10_000
    assert json.loads(out.read_text())["measured"] == seeds and (tmp_path / "tour.png").stat().st_size > 10_000


def test_runs_of_different_stages_are_refused(tmp_path: Path) -> None:
    runs = [run(tmp_path / "a", {"raft": 0.6}), run(tmp_path / "b", {"raft": 0.6, "ppo": 0.5})]
    with pytest.raises(ValueError, match=r"b: has ppo, raft, but .*a raft; finish both runs"):
        gather([str(path) for path in runs])
