"""Parametric laws: known ones recovered by each method, gradients, and fits of published points."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple

import numpy as np
import pytest

from llmtrain.scaling.laws import kaplan, parametric
from llmtrain.scaling.laws.kaplan import Kaplan, fit_kaplan
from llmtrain.scaling.laws.parametric import Parametric, fit_parametric, grid, huber
from llmtrain.scaling.laws.projection import fit_projection
from llmtrain.scaling.laws.read import Points, read_points
from tests.shared_data import shared_data

KNOWN = Parametric(1.8, 480.0, 2100.0, 0.35, 0.37, 0.0)
FIELDS = {"flops": "budget_flops"}


def drawn(law: Parametric | Kaplan, noise: float = 0.0) -> Points:
    """5 x 6 runs, with losses by a law."""
    params, tokens = (each.ravel() for each in np.meshgrid(np.geomspace(1e7, 1e10, 5), np.geomspace(1e9, 1e12, 6)))
    loss = law.loss(params, tokens) * np.exp(np.random.default_rng(0).normal(0, noise, len(params)))
    return Points(params, tokens, 6 * params * tokens, loss)


def some(points: Points) -> Parametric:
    return fit_parametric(points, grid()[::45])


def test_the_grid_is_the_published_one() -> None:
    starts = grid()
    assert starts.shape == (4500, 5) == np.unique(starts, axis=0).shape
    assert starts.min(0).tolist() == [-1, 0, 0, 0, 0] and starts.max(0).tolist() == [1, 25, 25, 2, 2]


def test_huber_by_hand() -> None:
    """Quadratic up to delta, linear beyond: 0.5 r^2 and delta (|r| - delta / 2)."""
    loss, slope = huber(np.array([0.0, 5e-4, -1e-3, 0.1]))
    np.testing.assert_allclose(loss, [0, 1.25e-7, 5e-7, 9.95e-5])
    np.testing.assert_allclose(slope, [0, 5e-4, -1e-3, 1e-3])


def test_the_optimum_by_hand() -> None:
    """With A = B and alpha = beta = 0.5, N* = D* = (C / 6)^0.5; the published fit's a is 0.5139."""
    law = Parametric(1.0, 100.0, 100.0, 0.5, 0.5, 0.0)
    assert law.params == pytest.approx((6**-0.5, 0.5)) and law.tokens.at(6e20) == pytest.approx(1e10)
    published = Parametric(1.8172, 477.8, 2143.9, 0.3473, 0.3672, 0.0)
    assert published.params_exponent == pytest.approx(0.5139, abs=1e-4)
    sizes = np.geomspace(1e8, 1e11, 3001)
    best = sizes[np.argmin(published.loss(sizes, 1e22 / (6 * sizes)))]
    assert published.params.at(1e22) == pytest.approx(best, rel=5e-3)


@pytest.mark.parametrize("module", [parametric, kaplan])
def test_gradients_are_those_of_differences(module: object) -> None:
    n, d, target = np.linspace(-2, 2, 7), np.linspace(1, -1, 7), np.linspace(0.2, 0.9, 7)
    width, more = (5, (1.0,)) if module is parametric else (4, ())
    x = np.random.default_rng(1).normal(0, 0.5, (3, width))
    value = lambda at: module.objective(at, n, d, target, *more)  # noqa: E731
    steps = 1e-6 * np.eye(width)
    numeric = np.stack([(value(x + each)[0] - value(x - each)[0]) / 2e-6 for each in steps], 1)
    np.testing.assert_allclose(value(x)[1], numeric, atol=1e-8)


@pytest.mark.parametrize("fit", [some, fit_projection])
def test_a_known_law_is_recovered(fit: Callable) -> None:
    assert astuple(fit(drawn(KNOWN)))[:5] == pytest.approx(astuple(KNOWN)[:5], rel=0.01)
    noisy = fit(drawn(KNOWN, 0.002))
    assert (noisy.E, noisy.alpha, noisy.beta) == pytest.approx((1.8, 0.35, 0.37), rel=0.06)


def test_both_ways_find_the_same_minimum() -> None:
    points = drawn(KNOWN, 0.01)
    one, other = some(points), fit_projection(points)
    assert other.objective == pytest.approx(one.objective, rel=1e-5)
    assert astuple(other) == pytest.approx(astuple(one), rel=0.01)


def test_the_objective_is_a_sum() -> None:
    points = drawn(KNOWN, 0.01)
    fit = some(points)
    residual = np.log(fit.loss(points.params, points.tokens)) - np.log(points.loss)
    assert fit.objective == pytest.approx(huber(residual)[0].sum())


def test_outliers_hardly_move_the_fit() -> None:
    points = drawn(KNOWN)
    points.loss[[3, 17]] *= 1.5
    assert some(points).alpha == pytest.approx(0.35, rel=0.02)


def test_drawn_points_count_as_often_as_drawn() -> None:
    points, start = drawn(KNOWN, 0.01), KNOWN
    rows = np.random.default_rng(0).integers(0, len(points), len(points))
    counts = np.bincount(rows, minlength=len(points))[None].astype(float)
    again = parametric.refit(points, counts, start)[0]
    assert astuple(again) == pytest.approx(astuple(some(points[rows])), rel=0.01)


def test_kaplan_is_recovered() -> None:
    """The values of arXiv 2001.08361."""
    known = Kaplan(8.8e13, 5.4e13, 0.076, 0.095, 0.0)
    assert known.loss(8.8e13, 1e99) == pytest.approx(1)
    found = fit_kaplan(drawn(known))
    assert (found.alpha_N, found.alpha_D) == pytest.approx((0.076, 0.095), rel=1e-3)
    assert (found.N_c, found.D_c) == pytest.approx((8.8e13, 5.4e13), rel=0.03)


@pytest.mark.parametrize("fit", [fit_parametric, fit_projection, fit_kaplan])
def test_too_few_points(fit: Callable) -> None:
    points = drawn(KNOWN)
    with pytest.raises(ValueError, match="5 points, needs at least 6"):
        fit(points[np.arange(5)])
    with pytest.raises(ValueError, match="fewer than 3 values of tokens"):
        fit(points[np.arange(10)])


@pytest.mark.slow
def test_chinchilla() -> None:
    """The refit of arXiv 2404.10102 is on 240 points of another figure; of our 123 those with a token a parameter or
    more give its E and, nearly, its alpha; and they do not exclude its beta (docs/scaling.md)."""
    points = read_points(str(shared_data("scaling/chinchilla.csv")), FIELDS)
    assert len(points) == 123
    points = points[points.tokens >= points.params]
    found = fit_parametric(points)
    assert (len(points), found.E) == (114, pytest.approx(1.8172, rel=0.01))
    assert found.alpha == pytest.approx(0.3473, rel=0.011)
    other = fit_projection(points)
    assert other.objective == pytest.approx(found.objective, rel=1e-6)
