"""One job a directory: the second is told who the first is, and the lock ends with its process."""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmtrain.observe import locks
from llmtrain.observe.locks import RUN_LOCK, hold, locked, making

HOLD = """
import sys, time
from llmtrain.observe.locks import hold
hold(sys.argv[1])
hold(sys.argv[1] + "/.")  # the same one
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> subprocess.Popen[str]:
    """A process that holds the directory `run`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_the_second_is_told_host_and_process_of_the_first(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    who = f"another job is at work there: process {holder.pid} on host {socket.gethostname()}"
    for place in (tmp_path / "run", f"{tmp_path}/run/", tmp_path / "link"):
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to("run")
        for _ in range(2):  # asking does not take the name away
            with pytest.raises(ValueError, match=who), locked(str(place)):
                pass
    with pytest.raises(ValueError, match=who):
        hold(str(tmp_path / "run"))


def test_it_ends_with_the_process_however_that_ends(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.kill()
    with locked(str(tmp_path / "run"), patience_s=10.0):
        pass
    with locked(str(tmp_path / "run")):
        pass


def test_a_restarted_rank_waits_for_the_end_of_the_one_before(
    tmp_path: Path, holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setattr(locks, "RESTART_S", 0.5)
    began = time.monotonic()
    with pytest.raises(ValueError, match="another job"):
        hold(str(tmp_path / "run"))
    assert 0.5 <= time.monotonic() - began < 5
    holder.kill()
    monkeypatch.setattr(locks, "RESTART_S", 10.0)
    monkeypatch.setattr(locks, "_held", {})
    hold(str(tmp_path / "run"))
    locks._held.popitem()[1].close()


def test_children_that_inherit_it_hold_it(tmp_path: Path) -> None:
    with locked(str(tmp_path)) as descriptor:
        child = subprocess.Popen(["sleep", "60"], pass_fds=(descriptor,))
    try:
        with (
            pytest.raises(ValueError, match=f"process {os.getpid()} .* a stage that it started"),
            locked(str(tmp_path)),
        ):
            pass
    finally:
        child.kill()
        child.wait()
    with locked(str(tmp_path)):
        pass


def test_what_is_being_made_is_locked_beside_it_and_the_lock_goes(tmp_path: Path) -> None:
    target = str(tmp_path / "tokenizer")
    with making(target):
        with pytest.raises(ValueError, match="another job"), making(target):
            pass
        with making(target + "2"):
            pass
        os.mkdir(target)
    assert os.listdir(tmp_path) == ["tokenizer"]


def test_a_lock_that_its_holder_removed_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the open and the lock of a second job, the first removes the file: a third would lock a new one."""
    real, opened = locks._opened, []

    def remove_once(directory: str, name: str) -> object:
        file = real(directory, name)
        if not opened:
            os.unlink(file.name)
        opened.append(file)
        return file

    monkeypatch.setattr(locks, "_opened", remove_once)
    with locked(str(tmp_path)):
        assert len(opened) == 2 and (tmp_path / RUN_LOCK).exists()


def test_a_file_system_without_locks_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(str(tmp_path)):
        assert "cannot be locked on this file system (Function not implemented)" in capfd.readouterr().err


def test_an_unwritable_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ValueError, match="file/run: cannot be written: Not a directory"),
        locked(f"{tmp_path}/file/run"),
    ):
        pass
