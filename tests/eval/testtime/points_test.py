from __future__ import annotations

import pytest

from llmtrain.eval.testtime.points import point


def test_a_point_is_the_means_over_problems() -> None:
    found = point([10, 30], [1.0, 1.0], 0, n=2)
    assert found == {"n": 2, "tokens": 20, "accuracy": 1.0, "interval": [1.0, 1.0]}


def test_interval_of_a_share_of_400_problems() -> None:
    # the mean of 400 fair coins has deviation 0.025, and 1.96 of them are 0.049; 1,000 resamples leave about 0.004
    found = point([1] * 400, [0.0, 1.0] * 200, 0)
    assert found["interval"] == pytest.approx([0.451, 0.549], abs=0.01)
    assert point([1] * 400, [0.0, 1.0] * 200, 0) == found
