from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmtrain.observe.passes import pass_curves, passes_image, task_tables, text_tables
from llmtrain.observe.report import write_report

SUMS = {"pass@1": 0.25, "pass@8": 0.75, "pass@2": 0.5, "acc": 0.5, "problems": 40, "cut_off": 0.125}
SUMS |= {"interval": {"pass@1": [0.2, 0.3], "pass@2": [0.4, 0.6], "pass@8": [0.7, 0.8]}}
TUNED = {"label": "tuned", "pass@1": 0.5, "pass@8": 0.9, "tasks": {"sums": SUMS, "arc": {"acc": 0.5, "problems": 9}}}
BASE: dict[str, Any] = {"label": "$base", "tasks": {"arc": {"acc": 0.25, "interval": {"acc": [0.2, 0.31]}}}}
ARC = {"acc,none": 0.3, "acc_stderr,none": 0.1, "version": 1.0, "problems": None}
HARNESS = {"label": "m", "lm_eval": {"harness": "0.4.13", "tasks": {"arc": ARC}}}


def test_curves_in_the_order_of_k() -> None:
    curves = pass_curves({"tuned": TUNED, "base": BASE})
    assert curves == {
        "data.held_out": {"tuned": [(1, 0.5, 0.5, 0.5), (8, 0.9, 0.9, 0.9)]},
        "sums": {"tuned": [(1, 0.25, 0.2, 0.3), (2, 0.5, 0.4, 0.6), (8, 0.75, 0.7, 0.8)]},
    }
    assert passes_image("/nowhere", {"base": BASE}) is None


def test_tables() -> None:
    tables = task_tables({"tuned": TUNED, "base": BASE})
    assert list(tables) == ["sums", "arc"]
    assert tables["arc"] == [
        {"model": "tuned", "acc": "0.500", "problems": "9"},
        {"model": "base", "acc": "0.250 (0.200 to 0.310)", "problems": "–"},
    ]
    assert tables["sums"][0]["pass@2"] == "0.500 (0.400 to 0.600)" and tables["sums"][0]["cut off"] == "0.125"
    tables = task_tables({"m": HARNESS, "tuned": TUNED})
    assert list(tables) == ["sums", "arc", "lm_eval: arc"]  # two tasks, whose names alone are equal
    shown = {"model": "m", "acc,none": "0.300", "acc stderr,none": "0.100", "version": "1.0", "problems": "–"}
    assert tables["lm_eval: arc"] == [shown]
    text = {"text": {"prose": {"loss": 2.0, "bits_per_byte": 1.5}, "code": {"loss": 1.0, "bits_per_byte": 1.0}}}
    assert text_tables({"m": text})[0] == {"source": "prose", "model": "m", "loss": "2.000", "bits per byte": "1.500"}
    assert text_tables({"m": {"text": {"prose": {}}}, "n": {}}) == []


def test_the_page_has_them(tmp_path: Path) -> None:
    for label, evaluation in {"a": TUNED, "b": BASE, "c": HARNESS}.items():
        (tmp_path / label).mkdir()
        (tmp_path / label / "eval.json").write_text(json.dumps(evaluation))
    page = Path(write_report(str(tmp_path))).read_text()
    assert "0.500 (0.400 to 0.600)" in page and "<h3>arc</h3>" in page and "$base" in page
    assert "<h3>lm_eval: arc</h3>" in page and "0.300" in page
    assert 'src="evaluation-passes.png"' in page and (tmp_path / "report" / "evaluation-passes.png").stat().st_size > 0
