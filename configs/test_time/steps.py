"""Scores the steps of a sum, as a process reward would: it checks what is written and knows no answer."""

from __future__ import annotations

import re
from typing import Any

EQUATION = re.compile(r"(\d+(?:[+-]\d+)+)=(-?\d+)")


def score(completion: str, example: dict[str, Any]) -> float:
    """Returns the share of the equations in a completion that hold, 1 without one.

    Example: " 3+4=7 write 7 carry 0; 4+1+0=6" -> 0.5
    """
    found = EQUATION.findall(completion)
    right = [sum(map(int, re.findall(r"[+-]?\d+", left))) == int(value) for left, value in found]
    return sum(right) / len(right) if right else 1.0
