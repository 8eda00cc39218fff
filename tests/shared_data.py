"""Finds data sets that lie beside the checkout."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

PLACE = Path(os.environ.get("LLMTRAIN_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))


def shared_data(name: str) -> Path:
    """Returns the path of a file or directory; skips the test where it is not there."""
    if not (PLACE / name).exists():
        pytest.skip(f"{PLACE / name} is not there; LLMTRAIN_SHARED_DATA names another directory")
    return PLACE / name
