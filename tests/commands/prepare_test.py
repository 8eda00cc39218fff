"""What `llmtrain data` takes from other sections of the document."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtrain.commands import prepare
from llmtrain.commands.stage_files import read_paths
from llmtrain.config.load import load
from llmtrain.config.recipes import RECIPES
from llmtrain.trainer import job
from llmtrain.trainer.job import with_tasks

TASK = "data: {path: %s}\nprompt: '{{question}}'\n"
DOCUMENT = """
data:
  collect: [{name: pages, type: pydoc}]
  clean: {contamination: {sets: {mine: more.jsonl}}}
eval:
  tasks:
    - {file: own.yaml}
    - {task: gsm8k, data: {path: "rows:test"}}
    - {task: arc_challenge, data: {path: more.jsonl}}
    - gcd
"""


def test_cleaning_looks_for_the_rows_of_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A generator has no rows, and those of arc_challenge are a set already."""
    (tmp_path / "own.yaml").write_text(TASK % "asked.jsonl")
    (tmp_path / "x.yaml").write_text(DOCUMENT)
    monkeypatch.chdir(tmp_path)
    config = load("x.yaml", [])
    found = with_tasks(config).clean.contamination.sets
    assert found == {"mine": "more.jsonl", "eval-own": "asked.jsonl", "eval-gsm8k": "rows:test"}
    files = {"own.yaml", "asked.jsonl", "rows:test", "more.jsonl"}
    assert files <= {path for _, path in read_paths("eval", config)}
    assert files & {path for _, path in read_paths("data", config)} == files - {"own.yaml"}
    off = load("x.yaml", ["data.clean.contamination=null"])
    assert with_tasks(off) == off.data


def test_training_on_what_data_has_made_asks_for_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A document that both commands are given: with other sets to look for the second would refuse the data."""
    (tmp_path / "x.yaml").write_text(DOCUMENT.replace("    - {file: own.yaml}\n", ""))
    monkeypatch.chdir(tmp_path)
    config, asked = load("x.yaml", ["data.sources=[{name: pages, type: cleaned}]"]), []
    for module in (prepare, job):
        monkeypatch.setattr(module, "prepare", lambda data, *_: asked.append(data))
    prepare.data(config)
    job.start_directory(config, RECIPES["pretrain"])
    assert asked == [with_tasks(config)] * 2 != [config.data] * 2


def test_tasks_that_cleaning_does_not_look_for_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "x.yaml").write_text(DOCUMENT.replace("    - {file: own.yaml}\n", "    - math500\n"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare, "prepare", lambda *_: None)
    line = "cleaning does not look for the rows of math500, lambada_openai, whose files it does not know"
    prepare.data(load("x.yaml", ["eval.lm_eval.tasks=[lambada_openai]"]))
    assert line in " ".join(capsys.readouterr().err.split())
    prepare.data(load("x.yaml", ["data.clean.contamination=null"]))
    assert "look for" not in capsys.readouterr().err
