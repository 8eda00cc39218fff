"""Names and files of hardware, right and wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtrain import cli
from llmtrain.arch.hardware import HARDWARE, hardware_of, peak_flops

ROOT = Path(__file__).parents[2]


def test_peaks_are_dense() -> None:
    assert [peak_flops(HARDWARE[name], "bf16") for name in ("a100", "h100", "b200")] == [312e12, 989.4e12, 2250e12]
    assert peak_flops(HARDWARE["h100"], "fp8") == 1978.9e12 and peak_flops(HARDWARE["a100"], "fp32") == 19.5e12
    assert all(each.source for each in HARDWARE.values())


def test_a_file_tells_all_its_faults_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("name: x\nbf16_tflops: -1\nmemory: 80\nwatts: fast\n")
    with pytest.raises(ValueError) as error:
        hardware_of(str(path))
    lines = str(error.value).splitlines()
    assert any(line.startswith(f"{path}:2: bf16_tflops: value -1: must be greater than 0") for line in lines)
    assert any(line.startswith(f"{path}:3: memory: unknown key, did you mean memory_gb?") for line in lines)
    assert any(line.startswith(f"{path}:4: watts: value 'fast': must be a number") for line in lines)
    assert any("memory_gb_per_s: is missing; add it" in line for line in lines)


def test_hardware_that_is_not_there_is_refused_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    tiny = str(ROOT / "configs/pretrain/tiny.yaml")
    assert cli.main(["plan", tiny, "plan.hardware=h1000"]) == 2
    told = "plan.hardware=h1000: is neither known nor a file; choose one of a100, h100, h200, b200, or measure it"
    assert capsys.readouterr().err.strip() == told
    assert cli.main(["plan", tiny, "plan.hardware=a100", "engine.precision=fp8"]) == 2
    assert "engine.precision=fp8: A100 SXM 80 GB has no fp8" in capsys.readouterr().err
    assert cli.main(["plan", tiny, "plan.hardware=a100", "plan.reserve_gb=80"]) == 2
    assert "plan.reserve_gb=80: must be below the 80 GB of A100" in capsys.readouterr().err
    assert cli.main(["plan", tiny, "plan.price_per_gpu_hour=2"]) == 2
    assert "plan.price_per_gpu_hour=2: needs plan.hardware" in capsys.readouterr().err


def test_figures_that_make_times_zero_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "fast.yaml"
    path.write_text("name: x\nbf16_tflops: 1.0e+300\nmemory_gb: 80\nmemory_gb_per_s: 1.0e+15\n")
    with pytest.raises(ValueError, match=r"fast\.yaml:2: bf16_tflops: .*must be less than or equal to"):
        hardware_of(str(path))
