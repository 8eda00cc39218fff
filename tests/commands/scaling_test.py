"""`llmtrain scaling`: from a document to tables, scaling.json and plots."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from llmtrain.cli import main


@pytest.fixture
def document(tmp_path: Path) -> Path:
    """A document, and four budgets of five runs with N* = 0.1 C^0.5."""
    lines = ["params,tokens,budget,loss"]
    for flops in (1e18, 1e19, 1e20, 1e21):
        for away in (-0.4, -0.2, 0.0, 0.2, 0.4):
            params = 0.1 * flops**0.5 * 10**away
            lines.append(f"{params},{flops / (6 * params)},{flops},{away**2 + 2}")
    (tmp_path / "points.csv").write_text("\n".join(lines))
    section = (
        f"scaling: {{points: {tmp_path}/points.csv, fields: {{flops: budget}}, method: [parabolas], bootstrap: 30}}"
    )
    (tmp_path / "laws.yaml").write_text(f"run_dir: {tmp_path}/run\n{section}\n")
    return tmp_path / "laws.yaml"


def test_what_it_writes(document: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):  # the second time it takes the place of the first
        assert main(["scaling", str(document), "scaling.target_flops=[1e24]"]) == 0
    run = document.parent / "run"
    assert {path.name for path in run.glob("*.*")} >= {"config.yaml", "scaling.json", "isoflops.png", "optima.png"}
    best = json.loads((run / "scaling.json").read_text())["methods"]["parabolas"]["params"]["best"][-1]
    assert best["flops"] == 1e24 and best["value"] == pytest.approx(1e11)
    shown = capsys.readouterr().out
    assert "parabolas" in shown and "1e+24" in shown and "best params" in shown


def test_warnings_are_told(document: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points = document.parent / "points.csv"
    points.write_text("\n".join(points.read_text().splitlines()[:16]))
    assert main(["scaling", str(document)]) == 0
    assert "warning: parabolas: only 3 budgets" in capsys.readouterr().out


def test_rewards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compute = np.logspace(1, 5, 12)
    rows = [f"{c},{0.2 + 0.4 / (1 + 100 / c)}" for c in compute]
    (tmp_path / "points.csv").write_text("\n".join(["flops,reward", *rows]))
    section = f"scaling: {{points: {tmp_path}/points.csv, method: [sigmoid], bootstrap: 20, target_flops: [1e7]}}"
    (tmp_path / "laws.yaml").write_text(f"run_dir: {tmp_path}/run\n{section}\n")
    assert main(["scaling", str(tmp_path / "laws.yaml")]) == 0
    found = json.loads((tmp_path / "run" / "scaling.json").read_text())["methods"]["sigmoid"]
    assert found["fit"]["R_max"] == pytest.approx(0.6, abs=1e-3) and (tmp_path / "run" / "rewards.png").exists()
    assert "Reward at the targets" in capsys.readouterr().out


def test_it_is_one_process(document: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["scaling", str(document)]) == 2
    assert "scaling runs in one process" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["scaling.points=null"], "scaling.points: must be set"),
        (["scaling.points=nowhere.csv"], "scaling.points=nowhere.csv: is no file"),
        (["scaling.method=[kaplan,kaplan]"], "has a method twice"),
        (["scaling.method=[kaplan,sigmoid]"], "document of its own"),
        (["scaling.fields={flops: C}"], "points.csv:1: has no column C"),
        (["scaling.min_tokens_per_param=1e9"], "leaves out all 20 points"),
    ],
)
def test_what_cannot_be_fitted(
    document: Path, changes: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["scaling", str(document), *changes]) == 2
    assert words in capsys.readouterr().err
    assert not (document.parent / "run" / "scaling.json").exists()
