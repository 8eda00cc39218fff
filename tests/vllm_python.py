"""Finds the interpreter that vLLM is installed in, for the tests that start its server."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import pytest

from llmtrain.config.vllm import VLLM_VERSION, installed_version

OURS = Path(__file__).parents[1] / ".venv-vllm" / "bin" / "python"


@cache
def _found() -> str | None:
    python = os.environ.get("LLMTRAIN_VLLM_PYTHON", str(OURS))
    return python if installed_version(python) == VLLM_VERSION else None


def vllm_python() -> str:
    """Returns the interpreter; skips the test where there is none."""
    python = _found()
    if python is None:
        pytest.skip(f"no interpreter with vLLM {VLLM_VERSION}: bash launch/vllm.sh")
    return python
