"""What a stage that cleans reads from outside of its run: raw documents, lists, and what is evaluated on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmtrain.commands.stage_files import contents
from llmtrain.config.schema import Config
from llmtrain.observe.contents import Checksums

FILES = ("pages/a.jsonl", "lists/en", "asked.jsonl")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    for name in FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("one")
    data = {
        "collect": [{"name": "pages", "type": "jsonl", "path": str(tmp_path / "pages")}],
        "clean": {"toxicity": {"word_lists": str(tmp_path / "lists")}},
        "held_out": str(tmp_path / "asked.jsonl"),
    }
    return Config.model_validate({"run_dir": str(tmp_path / "q/data"), "data": data})


def seen(config: Config, *made: str, command: str = "data") -> dict[str, str]:
    return contents(command, config, [*made], Checksums())


@pytest.mark.parametrize("changed", [*FILES, "pages/b.jsonl"])
def test_contents_of_what_is_cleaned_count(tmp_path: Path, config: Config, changed: str) -> None:
    before = seen(config)
    assert before.keys() == {"data.collect.pages", "data.clean.toxicity.word_lists", "data.held_out"}
    assert seen(config) == before
    (tmp_path / changed).write_text("other")
    assert len(seen(config).items() - before.items()) == 1


def test_inputs_that_a_stage_makes_do_not_count(tmp_path: Path, config: Config) -> None:
    assert "data.collect.pages" not in seen(config, str(tmp_path / "pages"))
    assert seen(config, command="eval").keys() == {"data.held_out"}


def test_inputs_may_go_when_they_are_cleaned(tmp_path: Path, config: Config) -> None:
    before, marker = seen(config), tmp_path / "q/data/data/clean/cleaned.json"
    marker.parent.mkdir(parents=True)
    marker.write_text(json.dumps({"contents": {"pages": before["data.collect.pages"]}}))
    (tmp_path / "pages/a.jsonl").unlink()
    assert seen(config) == before
