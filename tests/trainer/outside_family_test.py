"""A model family that is not in the package trains on any mesh: nothing in engine, parallel or trainer knows of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from llmtrain.arch.parameters import layer_shapes
from llmtrain.arch.resolve import parameter_count, resolve_model
from llmtrain.config.load import ConfigError, load

TINY = Path(__file__).parents[2] / "configs" / "pretrain" / "tiny.yaml"
TOY = ["plugins=[tests.model.toy_family]", "model.family=toy"]
FEW = ["train.steps=4", "train.eval_seqs=4", "engine.precision=fp32", "optim.warmup_steps=2", "log.wandb=off"]


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_four_ranks_are_one(forked: Callable, tmp_path: Path) -> None:
    layouts = {"one": (1, []), "four": (4, ["parallel.pp=2", "parallel.tp=2"])}
    for name, (ranks, keys) in layouts.items():
        shared = [f"data.path={tmp_path}/data", f"tokenizer.path={tmp_path}/tokenizer", f"run_dir={tmp_path}/{name}"]
        result = forked(ranks, "llmtrain", "pretrain", TINY, *TOY, *FEW, *shared, *keys, timeout_s=240)
        assert result.returncode == 0, result.stdout[-3000:]
    one, four = losses(tmp_path / "one"), losses(tmp_path / "four")
    assert len(one) == 4 and four == pytest.approx(one, rel=1e-5)  # fp32, sums in another order


def test_counts_and_shapes_are_those_of_its_own_layer() -> None:
    from llmtrain.model.decoder import Decoder, parameter_shapes

    load(str(TINY), TOY)
    model = resolve_model(load(str(TINY), TOY).model)
    shapes = {f"layers.1.{name}": shape for name, shape in layer_shapes(model, 1).items()}
    assert shapes.items() <= parameter_shapes(model).items()
    assert parameter_count(model) == sum(p.numel() for p in Decoder(model).parameters())


def test_a_plugin_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"override 'plugins=\[no_such\]': plugins: no_such cannot be imported"):
        load(str(TINY), ["plugins=[no_such]"])
