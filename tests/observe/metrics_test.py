from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llmtrain.observe.metrics import Events, MetricsFile, Samples, read_metrics


def _write(path: Path, steps: range, resume_step: int, run: int) -> None:
    metrics = MetricsFile(str(path), resume_step)
    for step in steps:
        metrics.write({"step": step, "run": run})
    metrics.close()


def test_every_step_once_after_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, range(1, 8), -1, run=0)
    with open(path, "a") as file:
        file.write('{"step": 8, "ru')  # cut by a kill
    _write(path, range(6, 11), 5, run=1)
    lines = read_metrics(str(path))
    assert [(r["step"], r["run"]) for r in lines] == [(s, 0) for s in range(1, 6)] + [(s, 1) for s in range(6, 11)]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_starting_anew_empties(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, range(0, 3), -1, run=0)
    MetricsFile(str(path), -1).close()
    assert read_metrics(str(path)) == []


def test_a_step_twice_is_refused_but_samples_share_one(tmp_path: Path) -> None:
    metrics, samples = MetricsFile(str(tmp_path / "m"), -1), Samples(str(tmp_path / "s"), -1)
    for sink in (metrics, samples):
        sink.write({"step": 3})
    samples.write({"step": 3})
    with pytest.raises(AssertionError, match="step 3 after step 3"):
        metrics.write({"step": 3})
    _write(tmp_path / "m", range(4, 5), 3, run=1)
    with pytest.raises(AssertionError, match="step 4 after step 4"):
        MetricsFile(str(tmp_path / "m"), 4).write({"step": 4})


def test_not_finite_becomes_null(tmp_path: Path) -> None:
    metrics = MetricsFile(str(tmp_path / "m"), -1)
    metrics.write({"step": 1, "loss": math.nan, "more": {"a": [math.inf, 1.5]}, "text": "7 × 3 <eos>"})
    text = (tmp_path / "m").read_text(encoding="utf-8")  # before close: each line is flushed
    assert json.loads(text) == {"step": 1, "loss": None, "more": {"a": [None, 1.5]}, "text": "7 × 3 <eos>"}


def test_lines_survive_a_kill(tmp_path: Path) -> None:
    code = (
        "import os, sys; from llmtrain.observe.metrics import MetricsFile\n"
        "m = MetricsFile(sys.argv[1], -1); m.write({'step': 1}); m.write({'step': 2}); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "m")], timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert [r["step"] for r in read_metrics(str(tmp_path / "m"))] == [1, 2]


def test_lines_wait_for_a_full_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(str(path), -1, patient=True)
    metrics.write({"step": 1})
    disk, full = metrics._file, open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    metrics._file = full
    for step in (2, 3):
        metrics.write({"step": step})
    assert [r["step"] for r in read_metrics(str(path))] == [1]
    assert len(caplog.records) == 1 and f"{path}: No space left on device; its lines wait" in caplog.text
    metrics._file = disk
    metrics.write({"step": 4})
    metrics._file = full
    metrics.write({"step": 5})
    metrics._file = disk
    metrics.close()
    assert [r["step"] for r in read_metrics(str(path))] == [1, 2, 3, 4, 5]
    full.close()


def test_a_line_is_amended(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(str(path), -1, patient=True)
    for step in (0, 1, 3):
        metrics.write({"step": step, "loss": 0.1, "none": float("nan")})
    metrics.amend(1, {"eval/loss": 0.25, "loss": 0.1})
    metrics.amend(2, {"eval/loss": 9.0})  # it has no line
    metrics.write({"step": 4})
    lines = [{"step": step, "loss": 0.1, "none": None} for step in (0, 1, 3)]
    lines[1]["eval/loss"] = 0.25
    assert read_metrics(str(path)) == [*lines, {"step": 4}]
    disk, metrics._file = metrics._file, open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    metrics.write({"step": 5})
    metrics.amend(5, {"eval/loss": 1.0})  # lines wait in memory, so the file on the disk is not whole
    assert "what was added to step 5 is in the log alone" in caplog.text
    metrics._file.close()
    metrics._file = disk
    metrics.close()
    assert read_metrics(str(path))[-1] == {"step": 5}
    metrics = MetricsFile(str(path), 5)
    path.unlink()
    with pytest.raises(OSError, match=r"No such file or directory: .*metrics.jsonl"):
        metrics.amend(5, {})


def test_half_a_line_is_completed(tmp_path: Path) -> None:
    """As the last free bytes of a disk take a part of one."""
    path = tmp_path / "m"
    metrics = MetricsFile(str(path), -1, patient=True)
    disk = metrics._file

    class Short:
        left = 5

        def write(self, data: bytes) -> int:
            if not self.left:
                raise OSError(errno.ENOSPC, "No space left on device")
            written = disk.write(data[: self.left])
            self.left -= written
            return written

    metrics._file = Short()
    metrics.write({"step": 1})
    assert path.read_text() == '{"ste' and read_metrics(str(path)) == []
    metrics._file = disk
    metrics.write({"step": 2})
    metrics.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_full_disk_is_named_and_lines_that_are_lost_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for patient in (False, True):
        path = tmp_path / f"m{patient}"
        metrics = MetricsFile(str(path), -1, patient)
        metrics._file.close()
        metrics._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
        if not patient:
            with pytest.raises(OSError, match=r"No space left on device: .*mFalse"):
                metrics.write({"step": 1})
            continue
        metrics.write({"step": 1})
        metrics.close()
        assert f"{path}: No space left on device; its last lines are lost" in caplog.text
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'"):
        Events("/dev/full").write({"step": 1, "event": "rewind"})


def test_events_are_on_the_disk_before_the_run_goes_on(tmp_path: Path, disk_calls: list[tuple]) -> None:
    path = str(tmp_path / "events.jsonl")
    events, lines = Events(path), [b'{"step": 1, "event": "skip"}\n', b'{"step": 2, "event": "skip"}\n']
    events.write({"step": 1, "event": "skip"})
    assert disk_calls == [("fsync", path, lines[0])]
    events.write({"step": 2, "event": "skip"})
    assert disk_calls[1:] == [("fsync", path, lines[0] + lines[1])]
    assert events.go_on_after(1) == [{"step": 1, "event": "skip"}]
    (synced, unfinished, written), renamed, folder = disk_calls[2:]
    assert (synced, written) == ("fsync", lines[0]) and renamed == ("rename", unfinished, path)
    assert folder == ("fsync", str(tmp_path), None)
    assert Path(path).read_bytes() == lines[0]


def test_events_that_stay(tmp_path: Path) -> None:
    """Rewinds stay whatever their step, but nothing stays when a run starts anew."""
    events = Events(str(tmp_path / "events.jsonl"))
    assert events.go_on_after(5) == []
    records = [{"step": step, "event": event} for step, event in ((3, "skip"), (9, "rewind"), (5, "skip"), (6, "skip"))]
    for record in records:
        events.write(record)
    assert events.go_on_after(5) == records[:3] == read_metrics(events.path)
    assert events.go_on_after(0) == [] == read_metrics(events.path)


@pytest.mark.parametrize("line", ["{broken", "[1]", '{"loss": 1}', '{"step": "1"}'])
def test_a_broken_line_in_the_middle_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + line + '\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: "):
        MetricsFile(str(path), 5)
    assert path.read_text().count("\n") == 3  # left as it was
