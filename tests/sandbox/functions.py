"""Functions that tests load into workers."""

from __future__ import annotations

import os
import time

STATE = {"calls": 0}


def count() -> int:
    """Returns how often it was called in this process."""
    STATE["calls"] += 1
    return STATE["calls"]


def echo(value: object) -> object:
    return value


def numpy_number(kind: str) -> object:
    import numpy

    return numpy.ones(2) if kind == "array" else getattr(numpy, kind)(1)


def fail(text: str) -> None:
    raise ValueError(text)


def sleep(seconds: float) -> str:
    time.sleep(seconds)
    return "slept"


def descriptors() -> list[int]:
    """Returns the open descriptors."""
    found = []
    for number in range(1024):
        try:
            os.fstat(number)
        except OSError:
            continue
        found.append(number)
    return found


def variables() -> dict[str, str]:
    return dict(os.environ)


def end() -> None:
    os._exit(3)
