"""`engine.precision: auto` is what this machine is fast in, and nothing else ever sees the word."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from llmtrain.config import machine
from llmtrain.config.load import dump, load, stage_config
from llmtrain.config.schema import Config, EngineConfig

AVX512 = "fpu avx2 avx512f avx512bw avx512dq avx512vl"


def test_agrees_with_torch() -> None:
    """A step in bf16 without the instructions for it takes several times as long."""
    assert machine.multiplies_bf16(machine.cpu_flags()) == torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert machine.has_gpu() == torch.cuda.is_available()


@pytest.mark.parametrize(
    ("line", "fast"),
    [
        (f"flags\t\t: {AVX512}", True),
        ("flags\t\t: fpu avx2 avx512f", False),
        ("flags\t\t: fpu avx2 avx_ne_convert", True),
        ("flags\t\t: fpu avx2 fma", False),
        ("Features\t: fp asimd bf16 i8mm", True),
        ("model name\t: unknown", False),
    ],
)
def test_processors(line: str, fast: bool, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{line}\npower management:\n")
    assert machine.multiplies_bf16(machine.cpu_flags(str(tmp_path / "cpuinfo"))) == fast
    assert machine.cpu_flags(str(tmp_path / "none")) == set()


@pytest.mark.parametrize("fast", [True, False])
def test_auto_is_resolved_at_once(fast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "has_gpu", lambda: fast)
    monkeypatch.setattr(machine, "cpu_flags", set)
    expected = "bf16" if fast else "fp32"
    assert EngineConfig(precision="auto").precision == expected and EngineConfig(precision="fp16").precision == "fp16"
    engine = {"precision": "auto"}
    stages = [{"name": "a", "command": "sft"}, {"name": "b", "command": "sft", "set": {"engine": engine}}]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"engine": engine, "stages": stages}))
    run = load(str(tmp_path / "run.yaml"), [])
    assert [stage_config(run, name).engine.precision for name in "ab"] == [expected, expected]
    for config in (stage_config(run, "b"), Config(engine=run.engine)):
        assert f"precision: {expected}" in dump(config) and "precision: auto" not in dump(config)


def test_a_wandb_key_is_that_of_the_environment_or_of_wandb_login(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert not machine.has_wandb_key()
    (tmp_path / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password secret\n")
    assert machine.has_wandb_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.here")
    assert not machine.has_wandb_key()
    (tmp_path / "other").write_text("machine wandb.here login user password secret")
    monkeypatch.setenv("NETRC", str(tmp_path / "other"))
    assert machine.has_wandb_key()
    (tmp_path / "other").write_text("broken {")
    assert not machine.has_wandb_key()
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert machine.has_wandb_key()
