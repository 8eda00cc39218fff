"""What is collected and how it is cleaned, refused before anything is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtrain.config.clean import CollectConfig, ExecutionConfig
from llmtrain.config.data import DataConfig, SourceConfig
from llmtrain.config.load import ConfigError
from llmtrain.config.schema import Config
from llmtrain.rules import cleaning, index
from llmtrain.rules.check import check, violations

PAGES = CollectConfig(name="pages", type="pydoc")


def faults(command: str = "data", **data: object) -> str:
    """What is told of a section data, '' if nothing."""
    try:
        check(Config(data=DataConfig(**data)), 1, command)
    except ConfigError as error:
        return str(error)
    return ""


def test_what_works_is_not_refused(tmp_path: Path) -> None:
    rows = CollectConfig(name="rows", type="jsonl", path=str(tmp_path))
    sources = [SourceConfig(name="pages", type="cleaned"), SourceConfig(name="x", type="cleaned", path=str(tmp_path))]
    assert faults(collect=[PAGES, rows], sources=sources) == ""
    assert faults() == ""


@pytest.mark.parametrize(
    "collect, told",
    [
        ([{"name": "../a", "type": "pydoc"}], "data.collect.../a.name=../a: must be at most 100 letters"),
        ([{"name": "", "type": "pydoc"}], "it names a folder; rename it"),
        ([{"name": "a" * 101, "type": "pydoc"}], "it names a folder; rename it"),
        ([{"name": "a", "type": "pydoc"}] * 2, "data.collect: 'a' is named twice"),
        ([{"name": "a", "type": "pydoc", "path": "x"}], "data.collect.a.path=x: not with type pydoc"),
        ([{"name": "a", "type": "warc"}], "data.collect.a.path: must be set, type warc reads files"),
        ([{"name": "a", "type": "csv", "path": "x", "split": "test"}], "a.split=test: only type datasets has it"),
        ([{"name": "a", "type": "csv", "path": "x", "streamed": True}], "a.streamed=True: only type datasets has it"),
    ],
)
def test_inputs(collect: list[dict], told: str) -> None:
    assert told in faults(collect=collect)
    assert told in faults("pretrain", collect=collect, sources=[{"name": "s", "type": "topics"}])


def test_all_faults_at_once() -> None:
    told = faults(collect=[{"name": "a", "type": "warc"}, {"name": "b", "type": "pdf"}])
    assert "data.collect.a.path" in told and "data.collect.b.path" in told


def test_a_cleaned_source_names_an_input() -> None:
    told = faults(collect=[PAGES], sources=[SourceConfig(name="page", type="cleaned")])
    assert told.startswith("data.sources.page: type cleaned has the name of an entry of data.collect, those are pages")


def test_the_run_of_a_document_without_stages() -> None:
    told = faults(collect=[PAGES], path="{run}/data")
    assert told == "data.path={run}/data: only a document with stages knows its run; write the path out"
    assert faults(fields={"prompt": "the {run} of a horse"}) == ""


def test_files_of_the_steps(tmp_path: Path) -> None:
    clean = {
        "url": {"blocked_domains": "no/domains"},
        "classifier": {"good": str(tmp_path), "bad": "no/bad"},
        "toxicity": {"word_lists": "no/lists"},
        "contamination": {"sets": {"mine": "no/set"}},
    }
    told = faults(collect=[PAGES], clean=clean).splitlines()
    assert [line.split("=")[0] for line in told] == [
        f"data.clean.{key}"
        for key in ("url.blocked_domains", "classifier.bad", "toxicity.word_lists", "contamination.sets.mine")
    ]
    assert faults(clean=clean) == "", "nothing is collected"


def test_executors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cleaning.shutil, "which", lambda name: None)
    told = faults(collect=[PAGES], executor="slurm", execution=ExecutionConfig(slurm={"time": "1:00"}))
    assert "data.execution.slurm must have partition; add" in told and "there is no sbatch on this machine" in told
    assert "only data.executor=slurm reads it" in faults(
        collect=[PAGES], execution=ExecutionConfig(slurm={"time": "1"})
    )
    monkeypatch.setattr(cleaning, "find_spec", lambda name: None)
    told = faults(collect=[PAGES], executor="ray")
    assert "needs the packages of the extra data" in told and "data.executor=ray: needs the package ray" in told


def test_the_plan_of_a_run_asks_for_no_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a document is planned, Slurm and the packages of its stages need not be."""
    monkeypatch.setattr(cleaning.shutil, "which", lambda name: None)
    for module in (cleaning, index):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    slurm = ExecutionConfig(slurm={"time": "1:00", "partition": "cpu"})
    config = Config(data=DataConfig(collect=[PAGES], executor="slurm", execution=slurm))
    assert violations(config, 1, "data", planned=True) == []
    assert len(violations(config, 1, "data")) == 2
    assert not [line for line in violations(config, 1, "index", planned=True) if "bm25s" in line]
