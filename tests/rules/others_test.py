"""Models that a recipe has beside its main one are checked before anything starts, with the key that names them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llmtrain.arch.resolve import resolve_model
from llmtrain.commands import stage_files
from llmtrain.config.load import load
from llmtrain.config.recipes.ppo import RECIPE
from llmtrain.config.schema import ModelConfig
from llmtrain.model.decoder import init_tensor, parameter_shapes
from llmtrain.model.hf_write import save_hf
from llmtrain.observe.contents import Checksums
from llmtrain.rules.check import violations
from llmtrain.trainer.identity import contents_of

SHAPE = {"num_layers": 4, "hidden_size": 32, "ffn_size": 48, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 512}


def written(directory: Path, **fields: object) -> str:
    """The directory of an untrained model."""
    model = resolve_model(ModelConfig.model_validate({**SHAPE, "max_positions": 256, **fields}))
    weights = ((name, init_tensor(name, shape, model, 0)) for name, shape in parameter_shapes(model).items())
    save_hf(str(directory), model, weights, torch.float32, None, 1)
    return str(directory)


def found(small: Path, ranks: int, *overrides: str, **model: object) -> list[str]:
    """The faults of `llmtrain ppo` with a policy that is there."""
    start = written(small.parent / "policy", **model)
    config = load(str(small), [f"model={json.dumps({'init_from': start})}", "grpo={}", *overrides])
    return [line.replace(str(small.parent), "") for line in violations(config, ranks, "ppo")]


def test_a_critic_of_any_head_and_size_is_taken(small: Path, tmp_path: Path) -> None:
    assert found(small, 4, "parallel.tp=2", "parallel.pp=2") == []
    scalar = written(tmp_path / "scalar", head="scalar", num_layers=2, hidden_size=16)
    assert found(small, 2, f"ppo.critic_from={scalar}", "parallel.pp=2", "parallel.stage_layers=[1, 3]") == []
    assert found(small, 1, f"ppo.critic_from={written(tmp_path / 'language', num_layers=1)}") == []


@pytest.mark.parametrize(
    ("critic", "ranks", "overrides", "message"),
    [
        (
            {"num_layers": 1},
            2,
            ("parallel.pp=2",),
            "ppo.critic_from: parallel.pp x virtual_stages=2: must be at most model.num_layers=1",
        ),
        ({"num_heads": 3, "num_kv_heads": 3, "hidden_size": 48}, 2, ("parallel.tp=2",), "ppo.critic_from: model.num_"),
        ({"max_positions": 32}, 1, (), "ppo.critic_from: model.max_positions=32: must be at least train.seq_len=64; "),
    ],
)
def test_one_that_does_not_fit_is_refused(
    small: Path, tmp_path: Path, critic: dict, ranks: int, overrides: tuple[str, ...], message: str
) -> None:
    lines = found(small, ranks, f"ppo.critic_from={written(tmp_path / 'critic', **critic)}", *overrides)
    assert lines and all(line.startswith("ppo.critic_from: ") for line in lines)
    assert any(line.startswith(message) for line in lines), lines


def test_one_that_is_not_there_is_refused(small: Path, tmp_path: Path) -> None:
    (line,) = found(small, 1, f"ppo.critic_from={tmp_path / 'nothing'}")
    assert line == "ppo.critic_from=/nothing: does not exist; give the directory of a model or of an earlier stage"
    (tmp_path / "empty").mkdir()
    (line,) = found(small, 1, f"ppo.critic_from={tmp_path / 'empty'}")
    assert line.startswith("ppo.critic_from: model.init_from=/empty: has neither config.json")


def test_a_policy_whose_body_takes_no_scalar_head_is_refused(small: Path) -> None:
    config = load(str(small), ["model.mup={base_hidden: 16}"])
    lines = [line for line in violations(config, 1, "ppo") if line.startswith("ppo.critic_from")]
    assert lines == [
        "ppo.critic_from: model.mup: not with model.head=scalar, has no rule for it; export the model, and start from "
        "the exported one"
    ]


def test_other_weights_are_part_of_what_a_stage_and_a_run_read(small: Path, tmp_path: Path) -> None:
    """Other weights at the path are another stage, and another run."""
    path = written(tmp_path / "critic", head="scalar")
    config = load(str(small), [f"ppo.critic_from={path}"])
    checksums = Checksums(str(tmp_path / "cache.json"))

    def seen() -> tuple[str, str]:
        stage = stage_files.contents("ppo", config, [], checksums)
        return stage["ppo.critic_from"], contents_of(config, RECIPE, "", "", checksums)["ppo.critic_from"]["sha256"]

    first = seen()
    assert "ppo.critic_from" not in stage_files.contents("ppo", config, [path], checksums)  # a stage makes it
    assert "ppo.critic_from" not in stage_files.contents("sft", config, [], checksums)
    (weights,) = Path(path).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-4] + b"1234")
    assert all(was != now for was, now in zip(first, seen(), strict=True))
