"""What a rank does when its launcher dies at an inconvenient moment."""

from __future__ import annotations

import os
import signal

import pytest
from torch.distributed import DistNetworkError, Store

from llmtrain.parallel import watch


def test_a_launcher_that_dies_while_the_store_is_read_is_noticed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The connection to its store breaks before this process has another parent."""
    parents, killed = iter([7, 7, 7, 1, 1]), []
    monkeypatch.setenv("WORLD_SIZE", "1")  # no thread of its own
    monkeypatch.setattr(watch, "BEAT_S", 0.01)
    monkeypatch.setattr(watch, "_store", lambda timeout_s: Store)
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append((pid, number)))

    def cut(self: watch.Watch, store: Store) -> None:
        raise DistNetworkError("Broken pipe")

    monkeypatch.setattr(watch.Watch, "_watch", cut)
    watch.Watch(60)._run()
    assert killed == [(os.getpid(), signal.SIGTERM)]
    assert (
        capsys.readouterr().err
        == "rank 0: the launcher is gone; saving and stopping, as it cannot be told to any more\n"
    )


def test_a_store_that_ends_with_the_run_is_no_accident(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(watch, "BEAT_S", 0.01)
    monkeypatch.setattr(watch, "_store", lambda timeout_s: Store)
    monkeypatch.setattr(os, "kill", lambda pid, number: pytest.fail("stopped"))
    ended = watch.Watch(60)

    def cut(self: watch.Watch, store: Store) -> None:
        ended.done.set()
        raise DistNetworkError("Broken pipe")

    monkeypatch.setattr(watch.Watch, "_watch", cut)
    ended._run()
