"""IsoFLOP parabolas: by hand, doubtful ones, and published values."""

from __future__ import annotations

import numpy as np
import pytest

from llmtrain.scaling.laws.parabolas import fit_parabola, fit_parabolas, power_law
from llmtrain.scaling.laws.read import Points, budgets_of, read_points
from tests.shared_data import shared_data

FIELDS = {"flops": "budget_flops"}


def ladder(budgets: list[float], around: tuple[float, ...] = (-0.4, -0.2, 0.0, 0.2, 0.4)) -> Points:
    """Runs whose loss is (log10 N - log10 N*)^2 + 2 with N* = 0.1 C^0.5."""
    flops = np.repeat(budgets, len(around))
    away = np.tile(around, len(budgets))
    params = 0.1 * flops**0.5 * 10**away
    return Points(params, flops / (6 * params), flops, away**2 + 2)


def test_a_parabola_by_hand() -> None:
    """Losses 3, 2, 3, 6 at N = 10, 100, 1000, 10000 are (x - 2)^2 + 2 of x = log10 N."""
    found, warnings = fit_parabola(np.array([10.0, 100, 1000, 10000]), np.array([3.0, 2, 3, 6]), 1e6)
    np.testing.assert_allclose(found.quadratic, (1, -4, 6), atol=1e-9)
    assert (found.best, found.loss) == pytest.approx((100, 2)) and found.used
    assert warnings == ["the optimum lies at the edge, fewer than 2 points on one side; add runs there"]


def test_a_power_law_by_hand() -> None:
    law = power_law(np.array([1.0, 100, 10000]), np.array([3.0, 30, 300]))
    assert law == pytest.approx((3, 0.5)) and law.at(1e6) == pytest.approx(3000)


@pytest.mark.parametrize("axis", ["params", "tokens"])
def test_known_laws_are_recovered(axis: str) -> None:
    found = fit_parabolas(ladder([1e18, 1e19, 1e20, 1e21]), axis)
    assert found.params == pytest.approx((0.1, 0.5)) and found.tokens == pytest.approx((1 / 0.6, 0.5))
    assert found.warnings == []


@pytest.mark.parametrize(
    ("sizes", "loss", "used", "words"),
    [
        ([1e6, 1e7], [3.0, 2.9], False, "2 sizes give no parabola"),
        ([1e6, 1e7, 1e7, 1e6], [3.0, 2.9, 2.8, 3.1], False, "2 sizes give no parabola"),
        ([1e6, 1e7, 1e8], [3.0, 2.0, 3.0], True, "3 points give a parabola without any residual"),
        ([1e6, 1e7, 1e8, 1e9], [2.0, 3.0, 3.0, 2.0], False, "curves down"),
        ([1e6, 1e7, 1e8, 1e9], [9.0, 6.1, 3.4, 0.9], False, "outside of its points"),
    ],
)
def test_doubtful_budgets(sizes: list[float], loss: list[float], used: bool, words: str) -> None:
    found, warnings = fit_parabola(np.array(sizes), np.array(loss), 1e18)
    assert found.used == used and any(words in each for each in warnings)


def test_few_budgets() -> None:
    assert fit_parabolas(ladder([1e18, 1e19, 1e20]), "params").warnings[0].startswith("only 3 budgets")
    with pytest.raises(ValueError, match="needs two budgets with a minimum among their points, 1 of 1 have one"):
        fit_parabolas(ladder([1e18]), "params")


def test_budgets_that_nearly_agree_are_one() -> None:
    flops = np.array([1.02e18, 1e19, 1e18, 1.03e18, 1.2e18])
    assert [each.tolist() for each in budgets_of(flops)] == [[2, 0, 3], [4], [1]]


def test_llama_3() -> None:
    """arXiv 2407.21783, figure 3: D* = 0.299 C^0.537, 16.55T tokens for 402B parameters."""
    found = fit_parabolas(read_points(str(shared_data("scaling/llama3.csv")), FIELDS), "tokens")
    assert found.tokens == pytest.approx((0.2994, 0.5368), rel=1e-3)
    assert found.tokens.at(3.8e25) == pytest.approx(16.1e12, rel=2e-3)
    assert found.tokens.at(3.99e25) == pytest.approx(16.55e12, rel=2e-3)
    assert found.params.at(3.99e25) == pytest.approx(402e9, rel=2e-3)


def test_chinchilla() -> None:
    """arXiv 2203.15556, figure 3 and table 2: a = 0.49, b = 0.51; 63B parameters at Gopher's 5.76e23 FLOPs."""
    found = fit_parabolas(read_points(str(shared_data("scaling/chinchilla.csv")), FIELDS), "params")
    assert round(found.params.exponent, 2) == 0.49 and round(found.tokens.exponent, 2) == 0.51
    assert found.params.at(5.76e23) == pytest.approx(63e9, rel=0.01)
