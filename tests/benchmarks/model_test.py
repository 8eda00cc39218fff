"""The model benchmark: its shapes, its verdicts, and one small run of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.model import main, verdicts
from benchmarks.shapes import SHAPES, Size, model_of
from llmtrain.arch.families import FAMILIES
from llmtrain.arch.resolve import hf_config, parameter_count


def rounds(wall_s: float, peak_bytes: int) -> list[dict]:
    return [{"wall_s": wall_s, "cpu_s": 2 * wall_s, "peak_bytes": peak_bytes, "values": [2.0]}]


@pytest.mark.parametrize("family", SHAPES)
def test_shapes_are_of_one_size_and_models_of_transformers(family: str) -> None:
    model = model_of(family, Size(256, 8, 2048, 256))
    assert 5e6 < parameter_count(model) < 10e6
    assert hf_config(model)["hidden_size" if family != "gpt2" else "n_embd"] == 256


def test_published_proportions() -> None:
    found = {}
    for family in ("mixtral", "qwen3-moe", "deepseek-v2", "deepseek-v3"):
        moe = model_of(family, Size(256, 8, 2048, 256, published=True)).moe
        found[family] = (moe.num_experts, moe.top_k, moe.expert_ffn_size, moe.shared_ffn_size)
    assert found == {
        "mixtral": (8, 2, 896, 0),
        "qwen3-moe": (128, 8, 96, 0),
        "deepseek-v2": (64, 6, 176, 352),
        "deepseek-v3": (256, 8, 72, 72),
    }


def test_every_family_with_a_reference_takes_part() -> None:
    known = {name for name, family in FAMILIES.items() if family.to_hf and family.parts is None}
    assert set(SHAPES) == known - {"gemma2"}  # the reference of its soft caps is the eager one only


@pytest.mark.parametrize(("family", "wall_s", "met"), [("llama", 1.01, True), ("mixtral", 1.01, False)])
def test_a_family_with_experts_has_to_be_faster(family: str, wall_s: float, met: bool) -> None:
    timed = {"llmtrain": rounds(1.0, 3), "transformers": rounds(wall_s, 4)}
    (found,) = verdicts(model_of(family, Size(64, 2, 128, 32)), timed)
    assert found["met"] is met and found["wall"] == wall_s and found["memory"] == 0.75


def test_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"hidden-size": 64, "layers": 2, "vocab": 64, "seq-len": 16, "seqs": 1, "rounds": 1, "threads": 1}
    out = tmp_path / "model.json"
    main(
        [f"--{name}={value}" for name, value in sizes.items()]
        + ["--only=qwen3-moe", "--device=cpu", "--precision=fp32", f"--out={out}"]
    )
    record = json.loads(out.read_text())
    assert list(record["families"]) == ["qwen3-moe"] and record["torch"] and record["transformers"]
    found = record["families"]["qwen3-moe"]
    assert found["losses"]["llmtrain"] == pytest.approx(found["losses"]["transformers"], rel=1e-4)
    assert [len(turns) for turns in found["rounds"].values()] == [1, 1]
    assert "qwen3-moe: llmtrain at least 1.2 times as fast as transformers" in capsys.readouterr().out
