"""Rules are tested as the newest torch that they know meets them."""

from __future__ import annotations

import pytest

from llmtrain.config import rules_parallel


@pytest.fixture(autouse=True)
def newest_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules_parallel, "torch_version", lambda: rules_parallel.ZERO_BUBBLE_TORCH)
