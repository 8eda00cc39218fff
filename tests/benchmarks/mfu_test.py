"""What of the benchmark of GPUs can be seen without one."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import mfu
from llmtrain.arch.resolve import parameter_count

ARGS = argparse.Namespace(warmup=3, steps=1, rounds=2)


@pytest.mark.parametrize(("name", "billions"), [("0.6b", 0.596), ("1.3b", 1.318), ("2.7b", 2.667)])
def test_sizes(name: str, billions: float) -> None:
    task = mfu.task_of(mfu.CASES[name], ARGS)
    assert parameter_count(task.model) / 1e9 == pytest.approx(billions, abs=1e-3)
    assert task.micro_batches * task.step_tokens == 65_536 and task.total_steps == 5


def test_a_step_has_its_microbatches() -> None:
    case = mfu.Case({"num_layers": 1, "hidden_size": 8, "vocab_size": 32, "num_heads": 2}, 16, 2, 3, {})
    steps = list(mfu.task_of(case, ARGS).steps())
    assert [[b.input_ids.shape for b in step] for step in steps] == [[(2, 16)] * 3] * 5
    assert len({tuple(b.input_ids[0].tolist()) for step in steps for b in step}) == 15


@pytest.mark.parametrize(("memory_bytes", "groups"), [(140e9, [["bf16", "fp8"]]), (80e9, [["bf16"], ["fp8"]])])
def test_variants_run_together_where_they_fit(
    monkeypatch: pytest.MonkeyPatch, memory_bytes: float, groups: list[list[str]]
) -> None:
    device = SimpleNamespace(total_memory=memory_bytes)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    assert [list(race) for race in mfu.races(mfu.CASES["2.7b"])] == groups


def test_a_profile_is_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("sys.argv", ["mfu", "--only", "0.6b", "--profile"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(mfu, "environment", lambda *args: {"gpu": "NVIDIA H200"})
    monkeypatch.setattr(mfu, "write_profile", lambda pair, task, threads, path, **how: seen.append((list(pair), path)))
    assert mfu.main() == 0 and seen == [(["bf16", "fp8"], Path("benchmarks/results/mfu_profile_0.6b.txt"))]


def test_a_gpu_of_unknown_peak_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["mfu"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(mfu, "environment", lambda *args: {"gpu": "NVIDIA L4"})
    assert mfu.main() == 2 and "add it to PEAK_FLOPS" in capsys.readouterr().out


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["mfu"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert mfu.main() == 2 and "needs a GPU" in capsys.readouterr().out
