"""Computes how sure a share is that was counted."""

from __future__ import annotations

import math

Z95 = 1.959964  # standard deviations of the normal distribution that hold 95 %


def wilson(share: float, count: float, z: float = Z95) -> tuple[float, float]:
    """Returns the ends of Wilson's score interval (JASA 22, 1927) of a share of `count` independent trials, by default
    that of 95 %. It stays within 0 and 1, also for shares of 0 and 1: wilson(1.0, 10) -> (0.722, 1.0)."""
    scale = 1 + z * z / count
    center = (share + z * z / (2 * count)) / scale
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / scale
    return max(0.0, center - half), min(1.0, center + half)
