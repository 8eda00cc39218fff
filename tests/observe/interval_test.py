from __future__ import annotations

import pytest

from llmtrain.observe.interval import wilson


@pytest.mark.parametrize(
    ("share", "count", "expected"),
    [  # by the formula, worked with a calculator
        (0.5, 100, (0.4038, 0.5962)),
        (1.0, 10, (0.7225, 1.0)),
        (0.0, 10, (0.0, 0.2775)),
        (0.65, 2312, (0.6303, 0.6692)),
    ],
)
def test_ends_of_the_interval(share: float, count: int, expected: tuple[float, float]) -> None:
    assert wilson(share, count) == pytest.approx(expected, abs=1e-4)
