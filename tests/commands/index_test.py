"""`llmtrain index`: from documents to a store, once, whole, and nothing of the user's replaced."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from llmtrain.cli import main
from llmtrain.commands import index as module
from llmtrain.data.search.store import open_store

pytest.importorskip("bm25s", reason="the extra `search` installs it")
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def document(tmp_path: Path) -> Path:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("# Cats\n\nCats sat.\n")
    (tmp_path / "docs" / "b.jsonl").write_text('{"text": "Dogs ran."}\n{"text": " "}\n')
    (tmp_path / "docs" / "empty.txt").write_text("")
    (tmp_path / "index.yaml").write_text(f"run_dir: {tmp_path}/run\nindex: {{documents: [{tmp_path}/docs]}}\n")
    return tmp_path / "index.yaml"


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_what_it_writes_and_that_it_writes_it_once(document: Path, capsys: Capture) -> None:
    assert main(["index", str(document)]) == 0
    store, told = document.parent / "run" / "store", capsys.readouterr().err
    assert "2 documents without text are left out" in told
    assert f"2 passages of 4 documents, 4 words, in {store}" in told
    assert [hit.passage.text for hit in open_store(str(store)).search("dogs", 5)] == ["Dogs ran."]
    before = contents(store)
    assert main(["index", str(document)]) == 0
    assert "is up to date, nothing to do" in capsys.readouterr().err and contents(store) == before
    assert sorted(os.listdir(document.parent / "run")) == ["store"]  # no lock and nothing half made


def test_another_store_is_replaced_only_where_that_is_asked_for(document: Path, capsys: Capture) -> None:
    store = document.parent / "run" / "store"
    assert main(["index", str(document)]) == 0
    before = contents(store)
    assert main(["index", str(document), "index.k1=2"]) == 2
    assert "holds a store that was made with other settings; set index.rebuild=true" in capsys.readouterr().err
    (document.parent / "docs" / "a.md").write_text("# Cats\n\nCats slept.\n")
    assert main(["index", str(document)]) == 2
    assert "made with other documents; set" in capsys.readouterr().err
    assert contents(store) == before
    assert main(["index", str(document), "index.rebuild=true"]) == 0
    assert [hit.passage.text for hit in open_store(str(store)).search("slept", 5)] == ["# Cats\n\nCats slept."]
    (store / "vocabulary.json").unlink()
    assert main(["index", str(document)]) == 0 and (store / "vocabulary.json").exists()  # it was not whole


def test_what_it_did_not_make_stays(document: Path, capsys: Capture) -> None:
    store = document.parent / "run" / "store"
    store.mkdir(parents=True)
    (store / "notes.txt").write_text("mine")
    assert main(["index", str(document), "index.rebuild=true"]) == 2
    assert "holds notes.txt, which llmtrain did not write" in capsys.readouterr().err
    assert contents(store) == {"notes.txt": b"mine"}
    (store / "notes.txt").unlink()
    assert main(["index", str(document)]) == 0
    (store / "manifest.json").write_text("{}")
    assert main(["index", str(document), "index.rebuild=true"]) == 2
    assert "holds manifest.json, which llmtrain did not write, or not as it is now" in capsys.readouterr().err


def test_all_faults_of_all_documents_at_once(document: Path, capsys: Capture) -> None:
    docs = document.parent / "docs"
    (docs / "bad.jsonl").write_text('{"text": "x", "id": "1"}\n{"text": 1, "id": "2"}\n{"text": "y", "id": "1"}\n')
    (docs / "bad.txt").write_bytes(b"\xff\xfe\xff")
    documents = f"[{docs}/bad.txt, {{path: {docs}/bad.jsonl, id_field: id}}]"
    assert main(["index", str(document), f"index.documents={documents}"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith(str(docs))] == [
        f"{docs}/bad.txt:1: not UTF-8 text but UTF-16; convert it with `iconv -f utf-16 -t utf-8`",
        f"{docs}/bad.jsonl:2: field 'text' must be a string, found int; write it in quotes",
        f"{docs}/bad.jsonl:3: id '1' is that of {docs}/bad.jsonl:1 too; give each document its own",
    ]
    assert lines[-1] == "index.documents: 3 faults"
    assert os.listdir(document.parent / "run") == []


def test_files_that_are_named_twice_or_hold_nothing(document: Path, capsys: Capture) -> None:
    docs = document.parent / "docs"
    assert main(["index", str(document), f"index.documents=[{docs}, {{name: again, path: {docs}/../docs/*.md}}]"]) == 2
    told = capsys.readouterr().err
    assert "index.documents.again.path: " in told and "a.md is named by index.documents.0.path too" in told
    assert main(["index", str(document), f"index.documents=[{docs}/empty.txt]"]) == 2
    assert "index.documents: 1 files, and no text in them" in capsys.readouterr().err
    assert main(["index", str(document), f"index.documents=[{docs}/*.rst, {docs}/x*]"]) == 2
    assert capsys.readouterr().err.count("no file to index there") == 2
    (docs / "c.txt").write_text("--- ...")
    assert main(["index", str(document), f"index.documents=[{docs}/c.txt]"]) == 2
    assert "hold no word" in capsys.readouterr().err


def test_one_that_was_killed_leaves_nothing_behind(document: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a kill -9 the half made directory stays until the next call, which removes it."""
    run = document.parent / "run"

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    real = module.build
    monkeypatch.setattr(module, "build", killed)
    assert main(["index", str(document)]) == 130 and os.listdir(run) == []
    half = run / ".llmtrain-00000000.tmp"
    half.mkdir()
    (half / "passages.jsonl").write_text("{")
    (half / ".llmtrain.json").write_text(json.dumps({"target": str(run / "store")}))
    monkeypatch.setattr(module, "build", real)
    assert main(["index", str(document)]) == 0 and os.listdir(run) == ["store"]


def test_a_store_elsewhere(document: Path) -> None:
    assert main(["index", str(document), f"index.path={document.parent}/new/store"]) == 0
    assert len(open_store(f"{document.parent}/new/store")) == 2
