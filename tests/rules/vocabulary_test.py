"""Every token id needs a row of the embedding: refused for every command, before anything starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmtrain import cli
from llmtrain.config.recipes import config_class
from llmtrain.config.schema import ModelConfig, ParallelConfig, TokenizerConfig
from llmtrain.rules.check import violations
from llmtrain.rules.vocabulary import largest_id

GAP = {"model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "far": 300}}, "added_tokens": [{"id": 7}]}


def written(directory: Path, content: object) -> str:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(content))
    return str(directory)


def faults(command: str, rows: int, ranks: int = 1, **keys: object) -> list[str]:
    config = config_class()(
        run_dir="not/there",
        model=ModelConfig(vocab_size=rows),
        tokenizer=TokenizerConfig(**keys),
        parallel=ParallelConfig(tp=ranks),
    )
    return [fault for fault in violations(config, ranks, command) if "vocab_size" in fault]


@pytest.mark.parametrize(("command", "ranks"), [("pretrain", 1), ("pretrain", 2), ("sft", 2), ("grpo", 1), ("plan", 2)])
def test_the_largest_id_counts_not_the_number_of_tokens(command: str, ranks: int, tmp_path: Path) -> None:
    path = written(tmp_path / "t", GAP)
    remedy = "raise it, or use the tokenizer that the model was trained with"
    line = f"model.vocab_size=300: must be above 300, the largest token id of {path}; {remedy}"
    assert faults(command, 300, ranks, path=path) == [line]
    assert faults(command, 302, ranks, path=path) == []


@pytest.mark.parametrize("command", ["eval", "export"])
def test_commands_that_do_not_train(command: str, tmp_path: Path) -> None:
    assert len(faults(command, 300, path=written(tmp_path / "t", GAP))) == 1
    assert faults(command, 301, path=str(tmp_path / "t")) == []


def test_a_base_and_a_tokenizer_that_is_not_there(tmp_path: Path) -> None:
    base = written(tmp_path / "base", GAP)
    assert len(faults("pretrain", 300, path=str(tmp_path / "new"), base=base)) == 1
    assert faults("pretrain", 301, path=str(tmp_path / "new"), base=base) == []
    assert faults("tokenizer", 300, path=str(tmp_path / "new"), base=base) == []  # a model has no part in it


@pytest.mark.parametrize(
    ("content", "largest"),
    [
        (GAP, 300),
        ({"model": {"vocab": [["a", -1.0], ["b", -2.0]]}}, 1),
        ({"model": {"vocab": [["a", -1.0]]}, "added_tokens": [{"id": 9}]}, 9),
        ({"model": {"vocab": {"a": 0}}, "added_tokens": None}, 0),
        ({"model": {"vocab": {}}}, None),
        ({"model": {}}, None),
        ([], None),
    ],
)
def test_the_largest_id_of_every_kind(content: object, largest: int | None, tmp_path: Path) -> None:
    assert largest_id(f"{written(tmp_path, content)}/tokenizer.json") == largest


def test_the_command_line_refuses_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.yaml").write_text(
        f"run_dir: {tmp_path}/run\nmodel: {{vocab_size: 32}}\ntokenizer: {{path: {written(tmp_path / 't', GAP)}}}\n"
        f"data: {{path: {tmp_path}/shards}}\n"
    )
    assert cli.main(["pretrain", str(tmp_path / "x.yaml")]) == 2
    assert "model.vocab_size=32: must be above 300" in capsys.readouterr().err and not (tmp_path / "run").exists()
