"""Finds the interpreter that the library verifiers is installed in, for the tests that play its environments."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

OURS = Path(__file__).parents[1] / ".venv-verifiers" / "bin" / "python"


def verifiers_python() -> str:
    """Returns the interpreter; skips the test where there is none."""
    python = os.environ.get("LLMTRAIN_VERIFIERS_PYTHON", str(OURS))
    if not os.path.exists(python):
        pytest.skip("no interpreter with verifiers: bash launch/verifiers.sh")
    return python
