from __future__ import annotations

import numpy as np
import pytest

from llmtrain.eval.intervals import bootstrap
from llmtrain.observe.interval import wilson


def test_a_share_has_about_wilsons_interval() -> None:
    values = [1.0] * 300 + [0.0] * 100
    low, high = bootstrap({"acc": values})["acc"]
    assert (low, high) == pytest.approx(wilson(0.75, 400), abs=0.01)  # two methods, and 1,000 resamples: +- 0.003


def test_equals_resampling_by_index() -> None:
    """The percentiles of means of problems drawn one by one, by another generator."""
    values = [0.0, 0.25, 0.5, 1.0, 1.0, 0.75, 0.0, 0.125]
    drawn = np.random.default_rng(9).choice(values, (100_000, len(values))).mean(1)
    expected = np.quantile(drawn, [0.025, 0.975])
    assert bootstrap({"x": values})["x"] == pytest.approx(expected, abs=0.04)  # means are multiples of 1/64


def test_same_seed_same_ends_and_same_problems_for_all_measures() -> None:
    values = [float(i % 3 == 0) for i in range(50)]
    both = bootstrap({"a": values, "b": [1 - v for v in values]})
    assert both["b"] == pytest.approx([1 - both["a"][1], 1 - both["a"][0]])
    assert both == bootstrap({"a": values, "b": [1 - v for v in values]}) != bootstrap({"a": values}, seed=1)
    assert bootstrap({"a": [1.0]}) == {"a": [1.0, 1.0]} and bootstrap({}) == {}


def test_faults() -> None:
    with pytest.raises(ValueError, match="at least one problem"):
        bootstrap({"a": []})
    with pytest.raises(ValueError):
        bootstrap({"a": [1.0], "b": [1.0, 0.0]})
