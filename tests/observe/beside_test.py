"""The curves of what a run measured beside its training, and the level that it started from."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtrain.observe import plots
from llmtrain.observe.beside import evaluation_panels, start_levels

METRICS = [
    {"step": 0, "eval/pass@8": 0.5, "eval/pass@1": 0.125, "eval/loss": 3.0, "eval_s": 1.0},
    {"step": 1, "loss": 2.5},
    {"step": 2, "loss": 2.0, "eval/pass@8": 0.75, "eval/pass@1": 0.25, "eval/loss": None, "eval/maj@8": 0.5},
]
SOLVED = {"eval/pass@1": "pass@1", "eval/pass@8": "pass@8"}


def test_panels_have_what_was_measured_by_k() -> None:
    (_, solved), (_, loss) = evaluation_panels(METRICS)
    assert list(solved.items()) == list(SOLVED.items()) and loss == {"eval/loss": "evaluated"}
    assert evaluation_panels([{"step": 1, "eval/pass@16": 1.0, "eval/pass@2": 1.0}])[0][1] == {
        "eval/pass@2": "pass@2",
        "eval/pass@16": "pass@16",
    }
    assert evaluation_panels([{"step": 1, "pass@1": 1.0, "eval/pass@": 1.0}])[0][1] == {}


def test_levels_are_those_of_step_0_alone() -> None:
    assert start_levels(METRICS) == {"eval/pass@8": 0.5, "eval/pass@1": 0.125, "eval/loss": 3.0}
    assert start_levels(METRICS[1:]) == start_levels(METRICS[2:]) == start_levels([]) == {}
    assert start_levels([{"step": 0, "eval/loss": None}]) == {}


def test_curves_are_drawn_with_a_line_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: drawn.append(figure))
    assert plots.plot_curves("x.png", evaluation_panels(METRICS), METRICS, start_levels(METRICS))
    solved, loss = drawn[0].axes
    points = {line.get_label(): [list(map(float, axis)) for axis in line.get_data()] for line in solved.lines}
    assert points == {
        "pass@1": [[0, 2], [0.125, 0.25]],
        "pass@1 before training": [[0, 1], [0.125, 0.125]],  # x is the width of the plot
        "pass@8": [[0, 2], [0.5, 0.75]],
        "pass@8 before training": [[0, 1], [0.5, 0.5]],
    }
    assert [text.get_text() for text in solved.get_legend().get_texts()] == list(points)
    assert [line.get_label() for line in loss.lines] == ["evaluated", "evaluated before training"]
    assert not plots.plot_curves("x.png", evaluation_panels(METRICS[1:2]), METRICS[1:2], {})
