"""Sigmoids of reward against compute."""

from __future__ import annotations

from dataclasses import astuple

import numpy as np
import pytest

from llmtrain.scaling.laws.sigmoid import Sigmoid, fit_sigmoid, refit_sigmoid

KNOWN = Sigmoid(0.2, 0.65, 800.0, 0.9, 0.0)
COMPUTE = np.logspace(1, 5, 20)


def test_by_hand() -> None:
    """Half of the gain at C_mid; with slope 1 three quarters of it at three times that."""
    assert Sigmoid(0.2, 0.6, 10.0, 1.0, 0.0).reward(np.array([10.0, 30.0])) == pytest.approx([0.4, 0.5])


def test_a_known_curve_is_recovered() -> None:
    found, warnings = fit_sigmoid(COMPUTE, KNOWN.reward(COMPUTE))
    assert astuple(found)[:4] == pytest.approx(astuple(KNOWN)[:4], rel=1e-4) and warnings == []


def test_noise_moves_the_asymptote_little() -> None:
    noisy = KNOWN.reward(COMPUTE) + np.random.default_rng(0).normal(0, 0.01, 20)
    assert fit_sigmoid(COMPUTE, noisy)[0].R_max == pytest.approx(0.65, abs=0.02)


def test_a_curve_that_has_not_bent_says_so() -> None:
    early = COMPUTE[:8]
    _, warnings = fit_sigmoid(early, KNOWN.reward(early))
    assert "the asymptote is extrapolated" in warnings[0]


def test_a_curve_that_has_bent_before_says_so() -> None:
    late = COMPUTE[12:]
    _, warnings = fit_sigmoid(late, Sigmoid(0.2, 0.65, 20.0, 0.9, 0.0).reward(late))
    assert any("before the first point" in each for each in warnings)


def test_points_count_as_often_as_drawn() -> None:
    noisy = KNOWN.reward(COMPUTE) + np.random.default_rng(1).normal(0, 0.01, 20)
    rows = np.random.default_rng(2).integers(0, 20, 20)
    counts = np.bincount(rows, minlength=20)[None].astype(float)
    one = refit_sigmoid(COMPUTE, noisy, counts)[0]
    assert one.R_max == pytest.approx(fit_sigmoid(COMPUTE[rows], noisy[rows])[0].R_max, abs=0.01)


def test_too_few_points() -> None:
    with pytest.raises(ValueError, match="4 values of compute, needs at least 5"):
        fit_sigmoid(np.array([1.0, 2, 3, 4, 4]), np.zeros(5))
