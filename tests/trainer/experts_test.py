"""Runs on two ranks: experts that tokens travel to, and a vocabulary that grows where it is cut over ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llmtrain.arch.resolve import resolve_model
from llmtrain.config.schema import ModelConfig
from llmtrain.model.decoder import init_tensor, parameter_shapes
from llmtrain.model.hf_write import save_hf
from tests.forked import run_forked

SEVERAL = Path(__file__).parents[1] / "several_runs.py"
FEW_STEPS = ("train.steps=3", "checkpoint.every_steps=0")
MOE = ("model.num_layers=2", "model.moe={num_experts: 4, expert_ffn_size: 16, dense_layers: [0], balance: aux}")


def pretrain(base: Path, config: Path, runs: dict[str, tuple[str, ...]]) -> dict[str, list[dict]]:
    """The records of each run, by the same two ranks."""
    lists = [["pretrain", str(config), f"run_dir={base / name}", *FEW_STEPS, *own] for name, own in runs.items()]
    result = run_forked(2, SEVERAL, json.dumps(lists), timeout_s=200)
    assert f"exit codes {[0] * len(runs)}" in result.stdout, result.stdout[-3000:]
    return {name: [json.loads(x) for x in (base / name / "metrics.jsonl").read_text().splitlines()] for name in runs}


def test_the_load_of_experts_is_recorded(small: Path, tmp_path: Path) -> None:
    layouts = {"ep": ("parallel.ep=2",), "tp": ("parallel.tp=2",), "dp": ()}
    runs = pretrain(tmp_path, small, {name: (*MOE, *own) for name, own in layouts.items()})
    for name, records in runs.items():
        assert len(records) == 3
        for record, expected in zip(records, runs["dp"], strict=True):
            assert 1 <= record["load_max.1"] <= 4 and 0 < record["load_entropy.1"] <= 1
            assert record["load_dropped.1"] == 0, name
            assert "load_max.0" not in record  # a dense layer
            assert record["loss"] == pytest.approx(expected["loss"], rel=1e-5)
            assert record["load_max.1"] == pytest.approx(expected["load_max.1"], rel=0.02)  # a near tie may turn


def test_a_vocabulary_grows_where_it_is_cut(small: Path, tmp_path: Path) -> None:
    shape = {"num_layers": 4, "hidden_size": 32, "ffn_size": 48, "num_heads": 4, "num_kv_heads": 2}
    model = resolve_model(ModelConfig(**shape, vocab_size=513, max_positions=256))
    weights = ((name, init_tensor(name, size, model, 0)) for name, size in parameter_shapes(model).items())
    save_hf(str(tmp_path / "hf"), model, weights, torch.float32, None, None)
    document, fixed = small.read_text(), "vocab_size: 512, max"
    assert fixed in document
    small.write_text(document.replace(fixed, f"init_from: {tmp_path / 'hf'}, vocab_multiple: 8, max"))
    runs = pretrain(tmp_path, small, {"whole": (), "cut": ("parallel.tp=2",)})
    for record, expected in zip(runs["cut"], runs["whole"], strict=True):
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert record["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    assert resolve_model(ModelConfig(init_from=str(tmp_path / "cut"))).vocab_size == 520
