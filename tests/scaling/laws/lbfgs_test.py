"""L-BFGS from many starts: minima that are known, and scipy's where it is there."""

from __future__ import annotations

import numpy as np
import pytest

from llmtrain.scaling.laws.lbfgs import minimise


def rosenbrock(x: np.ndarray, _: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = 1 - x[:, 0], x[:, 1] - x[:, 0] ** 2
    return a**2 + 100 * b**2, np.stack([-2 * a - 400 * b * x[:, 0], 200 * b], 1)


def test_every_start_reaches_the_minimum_of_rosenbrock() -> None:
    starts = np.random.default_rng(0).uniform(-3, 3, (50, 2))
    found = minimise(rosenbrock, starts)
    np.testing.assert_allclose(found.points, 1, atol=1e-6)
    assert found.steepest.max() <= 1e-9


def test_each_start_has_its_own_function() -> None:
    centers = np.arange(6.0).reshape(3, 2)
    found = minimise(lambda x, rows: (((x - centers[rows]) ** 2).sum(1), 2 * (x - centers[rows])), np.zeros((3, 2)))
    np.testing.assert_allclose(found.points, centers, atol=1e-9)


def test_a_kink_and_a_region_without_numbers_do_not_stop_it() -> None:
    def function(x: np.ndarray, _: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with np.errstate(invalid="ignore", divide="ignore"):  # x - log x, which is no number below 0
            return (x - np.log(x))[:, 0], 1 - 1 / x

    found = minimise(function, np.array([[0.01], [30.0]]))
    np.testing.assert_allclose(found.points, 1, atol=1e-6)


def test_scipy_finds_the_same() -> None:
    optimize = pytest.importorskip("scipy.optimize")
    start = np.array([-1.2, 1.0])
    one = optimize.minimize(
        lambda x: [each[0] for each in rosenbrock(x[None], None)], start, jac=True, method="L-BFGS-B", tol=1e-12
    )
    np.testing.assert_allclose(minimise(rosenbrock, start[None]).points[0], one.x, atol=1e-5)
