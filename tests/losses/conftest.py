from __future__ import annotations

import pytest

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hides what an engine that an earlier test built here told DeepSpeed of a launcher: TRL's trainers would look for
    its other ranks."""
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
