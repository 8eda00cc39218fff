"""Documents from files of every form, and what is said of those that cannot be used."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from llmtrain.config.index import DocumentsConfig
from llmtrain.data.faults import Faults
from llmtrain.data.search.documents import Document, Ids, documents_in, files_of


def read(path: Path, faults: Faults | None = None, **keys: str) -> list[Document]:
    found = Faults("") if faults is None else faults
    documents = list(documents_in(str(path), DocumentsConfig(path=str(path), **keys), found))
    if faults is None:
        found.raise_any()
    return documents


def names(path: Path | str) -> list[str]:
    return [os.path.basename(file) for file in files_of(DocumentsConfig(path=str(path)))]


def test_a_text_alone_is_the_path() -> None:
    assert DocumentsConfig.model_validate("a.md") == DocumentsConfig(path="a.md")


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_bytes(b"\xef\xbb\xbf# A\n\x1b[2J")  # a mark is no text; other controls are kept
    assert read(tmp_path / "a.md") == [Document(f"{tmp_path}/a.md", f"{tmp_path}/a.md", None, "# A\n\x1b[2J")]
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"packed"))
    assert read(tmp_path / "a.txt.gz")[0].text == "packed"


def test_rows_of_every_form_name_their_documents(tmp_path: Path) -> None:
    rows = [{"k": "x", "body": "one", "metadata": {"url": "https://a.example"}}, {"k": "y", "body": "two"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = read(tmp_path / "a.jsonl", field="body", id_field="k")
    assert found == [
        Document("x", f"{tmp_path}/a.jsonl:1", "https://a.example", "one"),
        Document("y", f"{tmp_path}/a.jsonl:2", None, "two"),
    ]
    pyarrow.parquet.write_table(pyarrow.table({"k": [7, 8], "body": ["one", "two"]}), tmp_path / "a.parquet")
    assert [d[:2] for d in read(tmp_path / "a.parquet", field="body", id_field="k")] == [
        ("7", f"{tmp_path}/a.parquet:1"),
        ("8", f"{tmp_path}/a.parquet:2"),
    ]
    assert [d.id for d in read(tmp_path / "a.parquet", field="body")] == [
        f"{tmp_path}/a.parquet:1",
        f"{tmp_path}/a.parquet:2",
    ]


def test_all_faults_are_told_with_their_lines(tmp_path: Path) -> None:
    faults = Faults("documents")
    lines = ['{"text": "good"}', "{", '{"body": "x"}', '{"text": 3}', '{"text": "a\\u0000b"}', '{"text": "\\ud800"}']
    (tmp_path / "a.jsonl").write_bytes("\n".join(lines).encode() + b'\n{"text": "\xff"}')
    (tmp_path / "latin.txt").write_bytes(b"one\ntwo \xe9")
    (tmp_path / "wide.txt").write_text("text", encoding="utf-16")
    (tmp_path / "binary.md").write_bytes(b"PK\0\0")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"text" * 99)[:-9])
    files = ["a.jsonl", "latin.txt", "wide.txt", "binary.md", "broken.parquet", "cut.txt.gz"]
    assert [d.text for name in files for d in read(tmp_path / name, faults)] == ["good"]
    told = [line.removeprefix(f"{tmp_path}/")[:44] for line in faults.lines]
    assert told == [
        "a.jsonl:2: not valid JSON (Expecting propert",
        "a.jsonl:3: missing field 'text'; found 'body",
        "a.jsonl:4: field 'text' must be a string, fo",
        "a.jsonl:5: holds a NUL character, so it is n",
        "a.jsonl:6: field 'text' has half a character",
        "a.jsonl:7: not UTF-8 text (byte 10); convert",
        "latin.txt:2: not UTF-8 text (byte 8); conver",
        "wide.txt:1: not UTF-8 text but UTF-16; conve",
        "binary.md: holds a NUL character, so it is n",
        "broken.parquet: cannot be read as Parquet (C",
        "cut.txt.gz: not a whole .gz file (Compressed",
    ]


@pytest.mark.parametrize("id_", [None, "", ["a", {}], {"a": 1}, "two\nlines", "x" * 3000, True])
def test_an_id_is_a_text_or_a_number(tmp_path: Path, id_: object) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x", "id": id_}))
    with pytest.raises(ValueError, match=r"a.jsonl:1: field 'id' must name the document by a text or a number, found"):
        read(tmp_path / "a.jsonl", id_field="id")


def test_an_id_is_given_once() -> None:
    ids, faults = Ids(), Faults("")
    documents = [Document(id_, f"f:{i}", None, "") for i, id_ in enumerate("aba")]
    assert [ids.is_new(document, faults) for document in documents] == [True, True, False]
    assert faults.lines == ["f:2: id 'a' is that of f:0 too; give each document its own"]


def test_below_a_directory_no_link_is_followed_and_nothing_hidden_read(tmp_path: Path) -> None:
    for name in ("b.md", "a/c.TXT", "a/rows.jsonl.zst", "a/.git/d.md", "code.py", ".e.md", "image.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "a" / "self").symlink_to("self")
    (tmp_path / "f.md").symlink_to(tmp_path / "b.md")
    os.mkfifo(tmp_path / "pipe.md")
    assert names(tmp_path) == ["c.TXT", "rows.jsonl.zst", "b.md"]
    assert names(f"{tmp_path}/**/*.md") == ["b.md"] and names(f"{tmp_path}/*.py") == ["code.py"]
    assert names(tmp_path / "f.md") == ["f.md"]  # a link that is named itself is meant


@pytest.mark.parametrize("name", ["nothing", "*.md", "folder", "pipe", "dangling", "self"])
def test_what_is_no_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to("gone")
    (tmp_path / "self").symlink_to("self")
    with pytest.raises(ValueError, match=r"(no file to index there|is no regular file|is not there); give a file"):
        names(tmp_path / name)
