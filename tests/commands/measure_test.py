"""What `llmtrain doctor --measure` writes is what `llmtrain plan` reads; rates are counted right."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmtrain import cli
from llmtrain.arch.hardware import hardware_of
from llmtrain.commands import measure

CPU = torch.device("cpu")


def test_rates_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product of 1,024 x 1,024 matrices has 2 x 1,024^3 FLOPs; a copy reads and writes its bytes."""
    monkeypatch.setattr(measure, "fastest_s", lambda work, device: 2.0)
    assert measure.product_tflops(CPU, torch.float32) == 2 * 1024**3 / 2 / 1e12
    assert measure.memory_rate(CPU) == 2 * 4 * 2**25 / 2 / 1e9


def test_the_first_call_does_not_count() -> None:
    calls: list[int] = []
    assert 0 < measure.fastest_s(lambda: calls.append(1), CPU) < 1 and len(calls) == measure.ROUNDS + 1


def test_the_file_is_read_by_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure, "fastest_s", lambda work, device: 0.5)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    path, document = tmp_path / "here.yaml", tmp_path / "x.yaml"
    assert cli.main(["doctor", "--measure", str(path)]) == 0
    assert f"written: {path}; use it as plan.hardware={path}" in capsys.readouterr().out
    found = hardware_of(str(path))
    assert found.bf16_tflops == pytest.approx(2 * 1024**3 / 0.5 / 1e12) and found.node_gb_per_s is None
    assert found.device == ("cuda" if torch.cuda.is_available() else "cpu")
    document.write_text(f"model: {{num_layers: 2}}\nplan: {{hardware: {path}}}\n")
    assert cli.main(["plan", str(document)]) == 0
    out = capsys.readouterr().out
    assert "tokens/s" in out and "kWh" not in out
    assert cli.main(["plan", str(document), "parallel.tp=2"]) == 2  # ranks send over links that nobody measured
    assert "has no network_gb_per_s, over which ranks send; add it to the file" in capsys.readouterr().err


def test_a_file_that_is_there_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.yaml").write_text("mine")
    assert cli.main(["doctor", "--measure", str(tmp_path / "x.yaml")]) == 2
    assert "x.yaml: is there already; remove it or give another name" in capsys.readouterr().err
    assert cli.main(["doctor", "--measure", str(tmp_path / "none" / "x.yaml")]) == 2
    assert "x.yaml: its directory does not exist; make it" in capsys.readouterr().err
