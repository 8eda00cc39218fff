"""Saves behind the training, and saves that fail: on a small file system of their own where this process may mount."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llmtrain.checkpoint import save as save_module
from llmtrain.checkpoint.group import LocalGroup
from llmtrain.checkpoint.load import CheckpointReader
from llmtrain.checkpoint.manifest import newest_intact, verify
from llmtrain.checkpoint.saver import Saver
from llmtrain.config.schema import CheckpointConfig
from llmtrain.types import Address, Fragment

MODES = pytest.mark.parametrize("background", [False, True])


class Live:
    """An engine whose fragments are views of what it trains, as the real ones' are."""

    def __init__(self, numel: int = 1000) -> None:
        self.values = {"weight": torch.zeros(numel), "exp_avg": torch.ones(numel)}
        self.shapes = {"p": (numel,)}

    def train(self) -> None:
        for value in self.values.values():
            value += 1

    def fragments(self) -> Iterator[Fragment]:
        yield Fragment(Address("p", self.shapes["p"], None, 0, 1, 0, self.shapes["p"][0]), dict(self.values))


def saver_of(engine: Live, directory: Path, background: bool, on_error: str = "warn", keep: int = 3) -> Saver:
    settings = CheckpointConfig(background=background, on_error=on_error, keep=keep)
    return Saver(str(directory), engine, engine.shapes, settings, LocalGroup())


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Nothing is written before it is set."""
    opened, write = threading.Event(), save_module.write_durably

    def wait_then_write(*args: object) -> dict:
        assert opened.wait(20)
        return write(*args)

    monkeypatch.setattr(save_module, "write_durably", wait_then_write)
    return opened


def test_a_background_save_holds_the_state_of_its_step(tmp_path: Path, gate: threading.Event) -> None:
    engine = Live()
    saver = saver_of(engine, tmp_path, background=True)
    torch.manual_seed(5)
    saver.save({"step": 1})
    engine.train()
    expected = torch.rand(3)
    assert saver.in_flight.is_alive() and newest_intact(str(tmp_path)) is None
    gate.set()
    saver.close()
    reader = CheckpointReader(newest_intact(str(tmp_path)))
    assert reader.full("p").unique().tolist() == [0.0] and reader.full("p", "exp_avg").unique().tolist() == [1.0]
    assert reader.restore_rng(0) and torch.rand(3).equal(expected)


def test_one_in_flight_and_one_buffer(tmp_path: Path, gate: threading.Event) -> None:
    engine = Live()
    saver = saver_of(engine, tmp_path, background=True)
    memory = saver.buffer.memory
    assert memory.numel() == 2000  # one copy of what the rank owns
    saver.save({"step": 1})
    engine.train()
    second = threading.Thread(target=saver.save, args=({"step": 2},))
    second.start()
    second.join(0.3)
    assert second.is_alive() and memory[0] == 0  # it waits, and the first's copy is whole
    gate.set()
    second.join(20)
    saver.close()
    assert saver.buffer.memory is memory and memory[0] == 1
    assert [CheckpointReader(str(tmp_path / f"step-0000000{n}")).full("p")[0].item() for n in (1, 2)] == [0, 1]


@MODES
def test_on_four_ranks_it_is_the_same_checkpoint(tmp_path: Path, fake: SimpleNamespace, background: bool) -> None:
    tensors, layout = fake.tensors(), fake.Layout(tp=2, dp=2)

    def action(group: object) -> None:
        settings = CheckpointConfig(background=background, keep=2)
        engine = fake.FakeEngine(layout, group.rank, tensors)
        with Saver(str(tmp_path), engine, fake.shapes(tensors), settings, group) as saver:
            for step in (1, 2, 3):
                saver.save({"step": step})
            saver.close()

    assert fake.run_ranks(4, action) == [None] * 4
    assert sorted(os.listdir(tmp_path)) == ["step-00000002", "step-00000003"]
    reader = CheckpointReader(newest_intact(str(tmp_path)))
    assert all(reader.full(name, key).equal(full) for name, keys in tensors.items() for key, full in keys.items())


# failures


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 kB."""
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", tmp_path], capture_output=True)
    if made.returncode:
        pytest.skip("mounting is not permitted here; tests/trainer/save_failure_test.py limits the file size instead")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


def remount(disk: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", disk], check=True)


@MODES
def test_a_full_disk_then_room(disk: Path, background: bool, caplog: pytest.LogCaptureFixture) -> None:
    engine = Live()
    saver = saver_of(engine, disk / "c", background)
    saver.save({"step": 1})
    saver.wait()
    (disk / "other").write_bytes(bytes(60_000))  # a checkpoint takes about 40 kB, most of it random state
    saver.save({"step": 2})
    saver.wait()
    assert "step 2 was not saved: rank 0: " in caplog.text and "No space left on device" in caplog.text
    assert os.listdir(disk / "c") == ["step-00000001"]
    verify(str(disk / "c/step-00000001"))
    with pytest.raises(OSError, match="No space left"):  # the end of the run
        saver.save({"step": 2}, last=True)
        saver.close()
    assert caplog.text.count("the run goes on") == caplog.text.count("the run ends here") == 1
    saver = saver_of(engine, disk / "c", background)
    (disk / "other").unlink()
    saver.save({"step": 3})
    saver.close()
    assert newest_intact(str(disk / "c")).endswith("step-00000003")


@MODES
def test_a_disk_that_became_read_only(disk: Path, background: bool, caplog: pytest.LogCaptureFixture) -> None:
    saver = saver_of(Live(), disk / "c", background)
    saver.save({"step": 1})
    saver.wait()
    remount(disk, "ro")
    saver.save({"step": 2})
    saver.wait()
    assert "step 2 was not saved" in caplog.text and "Read-only file system" in caplog.text
    assert newest_intact(str(disk / "c")).endswith("step-00000001")
    remount(disk, "rw")


@MODES
@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.EDQUOT])
@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir"])
def test_an_error_on_one_rank_is_the_same_decision_on_all(
    tmp_path: Path, fake: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, background: bool, code: int, call: str
) -> None:
    tensors, real = fake.tensors(), getattr(os, call)
    fake.save(tmp_path, tensors, fake.Layout(dp=2), 1)

    def broken(target: object, *args: object) -> object:
        path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else target
        if "step-00000002" in path and ("rank-00001" in path or call != "fsync"):
            raise OSError(code, os.strerror(code), path)
        return real(target, *args)

    monkeypatch.setattr(os, call, broken)

    def action(group: object, on_error: str) -> list:
        settings = CheckpointConfig(background=background, on_error=on_error)
        engine = fake.FakeEngine(fake.Layout(dp=2), group.rank, tensors)
        saver = Saver(str(tmp_path), engine, fake.shapes(tensors), settings, group)
        outcomes = []
        for collective in (lambda: saver.save({"step": 2}), saver.wait, saver.close):
            try:
                outcomes.append(collective())
            except OSError as error:
                outcomes.append(type(error))
        return [*outcomes, saver.failed]

    warned = fake.run_ranks(2, lambda group: action(group, "warn"))
    assert [(o[0], o[1], o[3]) for o in warned] == [(None, None, False)] * 2
    assert all(issubclass(o[2], OSError) for o in warned)
    stopped = fake.run_ranks(2, lambda group: action(group, "stop"))
    assert all(o[1] is not None and o[3] and (o[0] is None) == background for o in stopped), stopped
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["step-00000001"]
    verify(str(tmp_path / "step-00000001"))


@MODES
def test_old_ones_that_stay_are_no_failed_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """As on NFS, where what someone reads cannot be removed: the new one is whole, and so are those after it."""
    real = os.rmdir

    def busy(path: str, **kwargs: object) -> None:
        if "trash" in path:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), path)
        real(path, **kwargs)

    monkeypatch.setattr(os, "rmdir", busy)
    with saver_of(Live(), tmp_path, background, on_error="stop", keep=1) as saver:
        for step in (1, 2, 3):
            saver.save({"step": step})
        saver.close()
    assert caplog.text.count("is saved, but the ones before it could not be removed") == 2
    assert "was not saved" not in caplog.text and newest_intact(str(tmp_path)).endswith("step-00000003")
    monkeypatch.undo()
    with saver_of(Live(), tmp_path, background) as saver:
        saver.save({"step": 4})
        saver.close()
    assert sorted(os.listdir(tmp_path)) == ["step-00000003", "step-00000004"]


@MODES
def test_what_no_disk_can_help_with_ends_the_run(tmp_path: Path, background: bool) -> None:
    engine = Live()
    saver = saver_of(engine, tmp_path, background)
    engine.values["weight"] = torch.zeros(1000).half()
    with pytest.raises(ValueError, match="float16"):
        saver.save({"step": 1})
        saver.wait()


def test_a_parameter_that_no_rank_reports_is_named(tmp_path: Path) -> None:
    engine = Live()
    for shapes, message in (
        ({"p": (1000,), "q": (2, 3)}, r"q: is reported by no rank and has shape \[2, 3\] in the model"),
        ({"p": (10, 100)}, r"p: has shape \[1000\] and has shape \[10, 100\] in the model"),
        ({}, r"p: has shape \[1000\] and is unknown to the model"),
    ):
        engine_shapes = Saver(str(tmp_path), engine, shapes, CheckpointConfig(), LocalGroup())
        with pytest.raises(ValueError, match=message):
            engine_shapes.save({"step": 1})
    assert os.listdir(tmp_path) == []


def test_a_run_that_fails_lets_the_save_in_flight_end(tmp_path: Path, gate: threading.Event) -> None:
    with pytest.raises(FloatingPointError), saver_of(Live(), tmp_path, background=True) as saver:
        saver.save({"step": 1})
        threading.Timer(0.2, gate.set).start()
        raise FloatingPointError
    assert newest_intact(str(tmp_path)).endswith("step-00000001")
