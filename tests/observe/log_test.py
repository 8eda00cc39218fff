from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from llmtrain.observe import log as module
from llmtrain.observe.log import format_values, log, make_run_dir, progress


def test_only_rank_zero_speaks(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        log(f"rank {rank} [not markup] " + "long " * 40)
        with progress(1, 0, "train") as update:
            update(1, {"loss": float(rank)})
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "rank 0 [not markup] " + ("long " * 40),
        "train 1/1  loss 0  0 s left",
    ]


def test_plain_lines_every_ten_seconds(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 4))  # seconds: 4 a step
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    with progress(20, 10, "sft") as update:
        for step in range(11, 21):
            update(step, {"loss": 1.0})
    # lines 12 s apart: after 3 steps of 4 s 7 are left, and so on; and the last step
    assert capsys.readouterr().err.splitlines() == [
        "sft 13/20  loss 1  28 s left",
        "sft 16/20  loss 1  16 s left",
        "sft 19/20  loss 1  4 s left",
        "sft 20/20  loss 1  0 s left",
    ]


def test_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(module, "_console", Console(file=screen, force_terminal=True, width=140))
    with progress(10, 4, "pretrain") as update:
        log("a message above the bar")
        update(5, {"loss": 2.3071, "lr": 3e-5, "tokens_per_s": 12345.6})
    text = screen.getvalue()
    assert "a message above the bar" in text and "pretrain" in text and "5/10" in text
    assert "loss 2.307  lr 3.00e-05  tokens/s 12,346" in text


def test_format_values() -> None:
    assert format_values({"loss": 0.0, "lr": 0.005, "tokens_per_s": 999.94}) == "loss 0  lr 0.005  tokens/s 999.9"


def test_run_dir(tmp_path: Path) -> None:
    path = str(tmp_path / "runs" / "a")
    assert make_run_dir(path) == make_run_dir(path) == path and Path(path).is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="set run_dir"):
        make_run_dir(str(tmp_path / "file" / "a"))


def test_a_run_dir_that_cannot_be_written_is_one_line() -> None:
    """The folder is there, also for the superuser, and nothing can be made in it."""
    with pytest.raises(ValueError, match=r"run directory /proc/self/fdinfo: .*; set run_dir to a place that can be"):
        make_run_dir("/proc/self/fdinfo")
