"""What a document asks for: intervals, held-out budgets, points left out."""

from __future__ import annotations

import numpy as np
import pytest

from llmtrain.commands.scaling import warnings_of
from llmtrain.config.scaling import ScalingConfig
from llmtrain.scaling.laws.bootstrap import counts_of, drawn_rows, interval
from llmtrain.scaling.laws.fit import FITS, fit_losses, fit_rewards, kept
from llmtrain.scaling.laws.parametric import Parametric
from llmtrain.scaling.laws.read import Points

CHANGES = np.array([0.1, 0.3, 0.5, 0.75, 1.0, 1.3, 2.0, 3.0, 10.0])


def runs(noise: float) -> Points:
    """Five budgets of nine runs, whose losses follow a known law: N* = (C / 6)^0.5."""
    flops = np.repeat(np.logspace(18, 20, 5), len(CHANGES))
    params = np.sqrt(flops / 6) * np.tile(CHANGES, 5)
    tokens = flops / (6 * params)
    loss = 1.7 + 400 * (params**-0.35 + tokens**-0.35)
    return Points(params, tokens, flops, loss * np.exp(np.random.default_rng(3).normal(0, noise, len(loss))))


@pytest.fixture(scope="module")
def found() -> dict:
    methods = ["parabolas", "projection", "kaplan"]
    return fit_losses(runs(0.002), ScalingConfig(method=methods, bootstrap=60, target_flops=[1e22]), 0)


@pytest.mark.parametrize("method", ["parabolas", "projection"])
def test_intervals_hold_the_truth(found: dict, method: str) -> None:
    law = found["methods"][method]["params"]
    low, high = law["exponent_interval"]
    assert low < law["exponent"] < high and low < 0.5 < high and high - low < 0.1
    target = law["best"][-1]
    assert target["flops"] == 1e22 and target["interval"][0] < (1e22 / 6) ** 0.5 < target["interval"][1]


def test_the_largest_budget_is_predicted(found: dict) -> None:
    assert found["held_out"]["flops"] == pytest.approx(1e20)
    predicted = found["held_out"]["methods"]["projection"]
    assert abs(predicted["error"]) < 0.01 and len(predicted["runs"]) == len(CHANGES)
    assert predicted["error"] == pytest.approx(predicted["loss"] / predicted["real_loss"] - 1)
    assert abs(found["held_out"]["methods"]["parabolas"]["error"]) < 0.15


def test_the_largest_budget_has_no_part_in_its_prediction() -> None:
    points, settings = runs(0.0), ScalingConfig(method=["projection"], bootstrap=0)
    points.loss[-len(CHANGES) :] *= 1.5
    predicted = fit_losses(points, settings, 0)["held_out"]["methods"]["projection"]
    assert predicted["error"] == pytest.approx(1 / 1.5 - 1, abs=1e-3)


def test_what_cannot_be_predicted_says_why() -> None:
    points = runs(0.0)
    settings = ScalingConfig(method=["parabolas"], bootstrap=0)
    two = points[points.flops < 5e18]
    assert "needs two budgets" in fit_losses(two, settings, 0)["held_out"]["methods"]["parabolas"]["reason"]


def test_without_draws_there_are_no_intervals() -> None:
    law = fit_losses(runs(0.0), ScalingConfig(method=["parabolas"], bootstrap=0), 0)["methods"]["parabolas"]["params"]
    assert law["exponent_interval"] is None


def test_points_with_few_tokens_are_left_out() -> None:
    points, count = kept(runs(0.0), 0.9)  # tokens / params = 1 / change^2
    assert count == 20 and (points.tokens >= 0.9 * points.params).all()


def test_draws_stay_within_budgets_and_follow_the_seed() -> None:
    groups = [np.array([0, 1, 2]), np.array([3, 4])]
    rows = drawn_rows(groups, 50, 7)
    assert rows.shape == (50, 5) and (rows[:, :3] < 3).all() and (rows[:, 3:] >= 3).all()
    assert (rows == drawn_rows(groups, 50, 7)).all() and (rows != drawn_rows(groups, 50, 8)).any()
    assert counts_of(np.array([[0, 0, 2, 3, 3]]), 5).tolist() == [[2, 0, 1, 2, 0]]


def test_an_interval_by_hand() -> None:
    assert interval(list(range(41))) == (1.0, 39.0) and interval([1.0] * 19) is None


def test_the_asymptote_has_an_interval() -> None:
    compute = np.logspace(1, 5, 20)
    reward = 0.2 + 0.45 / (1 + (800 / compute) ** 0.9) + np.random.default_rng(0).normal(0, 0.01, 20)
    columns = {"flops": compute, "reward": reward}
    found = fit_rewards(columns, ScalingConfig(method=["sigmoid"], bootstrap=100, target_flops=[1e6]), 0)
    low, high = found["intervals"]["R_max"]
    assert low < 0.65 < high and high - low < 0.1
    assert found["targets"][0]["reward"] == pytest.approx(0.65, abs=0.02)


def test_a_sigmoid_stands_alone() -> None:
    with pytest.raises(ValueError, match="document of its own"):
        ScalingConfig(method=["sigmoid", "parabolas"])


def test_a_law_without_a_best_size() -> None:
    """A short ladder, whose small budgets have their lowest loss at the smallest size."""
    losses = [5.0620, 5.0791, 5.5135, 4.5977, 4.7402, 5.2987, 4.0825, 4.1666, 5.0018]
    flops, params = np.repeat([1e10, 2e10, 4e10], 3), np.tile([45408.0, 58016.0, 166208.0], 3)
    points = Points(params, flops / (6 * params), flops, np.array(losses))
    asked = ScalingConfig(method=["projection"], bootstrap=20, min_tokens_per_param=None, held_out=False)
    found = fit_losses(points, asked, 0)["methods"]["projection"]
    assert any("of 20 draws of the points have no law" in each for each in found["warnings"])
    assert not Parametric(1.0, 400.0, 400.0, -0.3, 0.4, 0.0).has_optimum
    assert not Parametric(1.0, float("inf"), 400.0, 0.3, 0.4, 0.0).has_optimum


def test_a_rising_loss_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FITS, "parametric", lambda points: Parametric(1.0, 400.0, 400.0, -0.3, 0.4, 0.0))
    with pytest.raises(
        ValueError, match=r"scaling.method=parametric: alpha=-0.3, .*has no best size; add runs or leave"
    ):
        fit_losses(runs(0.0), ScalingConfig(method=["parametric"], bootstrap=0, held_out=False), 0)


def test_a_method_without_a_law_keeps_no_other_from_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FITS, "parametric", lambda points: Parametric(1.0, 400.0, 400.0, -0.3, 0.4, 0.0))
    asked = ScalingConfig(method=["parametric", "parabolas"], bootstrap=0, held_out=False)
    found = fit_losses(runs(0.0), asked, 0)
    assert list(found["methods"]) == ["parabolas"] and "has no best size" in found["failed"]["parametric"]
    assert next(iter(warnings_of(found))).startswith("parametric: no law: scaling.method=parametric: alpha=-0.3")
