"""Lets the tests of rules meet the newest torch that the rules know."""

from __future__ import annotations

import pytest

from llmtrain.rules import layout


@pytest.fixture(autouse=True)
def newest_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "torch_version", lambda: layout.ZERO_BUBBLE_TORCH)
