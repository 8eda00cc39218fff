"""Documents of `llmtrain index` that cannot work."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llmtrain.config.load import load
from llmtrain.rules import index as module
from llmtrain.rules.check import violations


def told(tmp_path: Path, section: str) -> list[str]:
    (tmp_path / "a.yaml").write_text(f"index: {section}")
    return violations(load(str(tmp_path / "a.yaml"), []), 1, "index")


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: name)


@pytest.mark.parametrize(
    ("section", "line"),
    [
        ("{}", "index.documents: is empty; list files"),
        ("{documents: [gone]}", "index.documents.0.path=gone: does not exist; give a file"),
        ("{documents: [{name: n, path: gone}]}", "index.documents.n.path=gone: does not exist"),
        ("{documents: [{name: n, path: .}, {name: n, path: .}]}", "index.documents: two are called 'n'"),
        (
            "{documents: [.], passage_size: 10, passage_overlap: 5}",
            "index.passage_overlap=5: must be less than half of ",
        ),
        ("{documents: [.], model: gone}", "index.model=gone: does not exist; give a Hugging Face directory"),
        ("{documents: [.], tokenizer: .}", "index.tokenizer=.: counts nothing with unit=characters"),
        ("{documents: [.], unit: tokens}", "index.unit=tokens: of which tokenizer; set index.tokenizer or index.model"),
        ("{documents: [.], unit: tokens, model: /}", "index.unit=tokens: / has no tokenizer.json"),
        ("{documents: [.], query_prefix: 'q: '}", "index.query_prefix='q: ': is for an encoder; set index.model"),
    ],
)
def test_each_is_refused_with_its_remedy(tmp_path: Path, section: str, line: str) -> None:
    found = told(tmp_path, section)
    assert len(found) == 1 and found[0].startswith(line), found


def test_what_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    assert told(tmp_path, "{documents: [., 'none/**/*.md']}") == []
    assert (
        told(tmp_path, f"{{documents: [.], unit: tokens, tokenizer: {tmp_path}, passage_size: 11, passage_overlap: 5}}")
        == []
    )
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert told(tmp_path, "{documents: [.]}") == [
        "index: needs bm25s, which is not installed; pip install 'llmtrain[search]' -c constraints.txt"
    ]


def test_it_runs_in_one_process(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("index: {documents: [.]}")
    lines = violations(load(str(tmp_path / "a.yaml"), []), 2, "index")
    assert lines == ["ranks=2: index runs in one process; start it without torchrun (ranks: 1)"]


def test_a_task_whose_store_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = "{name: t, prompt: '{{passages}}', data: {path: .}, context: {store: gone}}"
    (tmp_path / "a.yaml").write_text(f"eval: {{tasks: [{task}]}}")
    config = load(str(tmp_path / "a.yaml"), [])

    def found() -> list[str]:
        return [line for line in violations(config, 1, "eval") if line.startswith("eval.tasks")]

    key = "eval.tasks.t.context"
    missing = f"{key}.store=gone: does not exist; make it with `llmtrain index`, or give another"
    assert found() == [missing]
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert found() == [
        missing,
        f"{key}: needs bm25s, which is not installed; pip install 'llmtrain[search]' -c constraints.txt",
    ]


def test_the_task_of_the_page_lacks_its_files_alone(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "rollouts" / "search.md").read_text()
    (block,) = [text for text in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) if "{{passages}}" in text]
    (tmp_path / "a.yaml").write_text(block)
    found = violations(load(str(tmp_path / "a.yaml"), []), 1, "eval")
    keys = {line.partition("=")[0].partition(":")[0] for line in found}
    assert keys & {"data.held_out", "data.path"} == set()
    assert "eval.tasks.handbook.data.path" in keys
