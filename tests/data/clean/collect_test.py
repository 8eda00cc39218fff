"""Documents from every type of file: texts, metadata, counts, which files a task reads, and what is refused."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("datatrove")

import datasets
import fsspec

from llmtrain.config.clean import CollectConfig
from llmtrain.data.clean.collect import Collect, input_files, refuse_unreadable, task_count
from llmtrain.data.clean.step import KEYS
from tests.data.clean.members import (
    COMPRESSIONS,
    MEMBERS,
    TEXTS,
    collected,
    dropped,
    json_lines,
    page,
    record,
    response,
)

SHARED = Path(os.environ.get("LLMTRAIN_DATA", Path(__file__).parents[4] / "shared" / "data"))
EXPECTED = {
    "text": TEXTS[:1],
    "markdown": ["# Title\n\nSome *text*.\n"],
    "warc": [page(text).decode() for text in TEXTS],
    "html": [page(TEXTS[0]).decode()],
    "pdf": ["The first page\n\nThe second page"],
    "code": ["# SPDX-License-Identifier: MIT\nprint('a')\n"],
    "dialogue": [f"user: {text}\n\nassistant: Yes." for text in TEXTS],
}


def config(type_: str, path: Path | str, **keys: object) -> CollectConfig:
    return CollectConfig(name="input", type=type_, path=str(path), **keys)


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("ending", COMPRESSIONS)
@pytest.mark.parametrize("type_", MEMBERS)
def test_every_type_gives_its_texts_also_compressed(type_: str, ending: str, tmp_path: Path) -> None:
    if type_ == "pdf":
        pytest.importorskip("pypdf")
    if type_ == "code" and ending:
        pytest.skip("source files are not compressed")
    name, data = MEMBERS[type_]
    path = write(tmp_path / (name + ending), COMPRESSIONS[ending](data))
    documents, counts, _ = collected(type_, tmp_path)
    assert [document.text for document in documents] == EXPECTED.get(type_, TEXTS)
    assert counts["documents_out"] == len(documents) and counts["files"] == 1
    assert counts["bytes_out"] == sum(len(document.text.encode()) for document in documents)
    assert dropped(counts) == ({"no_response": 1} if type_ == "warc" else {})
    assert all(document.metadata.keys() >= {*KEYS} for document in documents)
    assert {document.metadata["file"] for document in documents} == {str(path)}
    assert len({document.id for document in documents}) == len(documents)


def test_a_row_says_its_own_id_date_licence_language_and_address(tmp_path: Path) -> None:
    rows = [
        {
            "body": "one",
            "key": 7,
            "created": "2020-01-02",
            "license": ["MIT", "ISC"],
            "meta": {"lang": "de", "url": "u"},
        },
        {"body": "two"},
    ]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)).encode())
    keys = {"field": "body", "id_field": "key", "licence": "CC0-1.0", "language": "en", "date": "1999"}
    first, second = collected("jsonl", path, **keys)[0]
    known = {"source": "input", "kind": "prose", "file": str(path)}
    assert (first.text, first.id) == ("one", "7")
    assert first.metadata == known | {"date": "2020-01-02", "licence": "MIT ISC", "language": "de", "url": "u"}
    assert (second.text, second.id) == ("two", f"{path}#2")
    assert second.metadata == known | {"date": "1999", "licence": "CC0-1.0", "language": "en"}


def test_rows_without_a_text_are_counted_by_what_is_wrong(tmp_path: Path) -> None:
    lines = [
        b'{"text": 1}',
        b'{"other": "a"}',
        b"[1]x",
        b"3",
        b'{"text": " "}',
        b"",
        b'{"text": "a", "score": NaN}',
        b"{",
    ]
    path = write(tmp_path / "a.jsonl", b"\n".join(lines))
    documents, counts, examples = collected("jsonl", path)
    assert [(document.text, document.id) for document in documents] == [("a", f"{path}#7")]
    assert dropped(counts) == {"not_text": 1, "no_field": 1, "json_broken": 2, "not_an_object": 1, "empty": 1}
    found = [(each.metadata["row"], each.metadata["reason"]) for each in examples]
    assert found == [
        *[(1, "not_text"), (2, "no_field"), (3, "json_broken"), (4, "not_an_object"), (5, "empty"), (8, "json_broken")]
    ]
    assert examples[0].metadata["dropped_by"] == "collect" and examples[0].metadata["file"] == str(path)


@pytest.mark.parametrize("first", [b"[1, 2]", b"[", b'[{"text": "in a list"}]'])
def test_a_list_in_the_first_line_costs_no_other_line(first: bytes, tmp_path: Path) -> None:
    documents, counts, _ = collected("jsonl", write(tmp_path / "a.jsonl", first + b"\n" + json_lines()))
    assert [document.text for document in documents] == TEXTS and sum(dropped(counts).values()) == 1


def test_tasks_read_every_file_once_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b/2", "a/1", "c", "b/10"):
        write(tmp_path / f"{name}.txt", name.encode())
    whole = config("text", tmp_path)
    names = ["a/1", "b/10", "b/2", "c"]
    assert input_files(whole) == [str(tmp_path / f"{name}.txt") for name in names] and task_count(whole) == 4
    parts = [[document.text for document in Collect(whole).run(None, rank, 3)] for rank in range(3)]
    assert parts == [["a/1", "c"], ["b/10"], ["b/2"]]
    assert [each.text for each in collected("text", tmp_path, max_documents=3)[0]] == names[:3]
    assert [Path(each).stem for each in input_files(config("text", tmp_path / "**" / "1*.txt"))] == ["1", "10"]
    assert [Path(each).stem for each in input_files(config("text", tmp_path / "*.txt"))] == ["c"]


def test_files_of_another_file_system_are_read(tmp_path: Path) -> None:
    files = fsspec.filesystem("memory")
    for name, data in (MEMBERS["jsonl"], ("sub/" + MEMBERS["parquet"][0], MEMBERS["parquet"][1]), ("x.bin", b"x")):
        files.pipe(f"/collect/{name}", data)
    documents, counts, _ = collected("dialogue", "memory://collect", kind="prose")
    assert [each.text for each in documents] == TEXTS * 2 and dropped(counts) == {"other_ending": 1}
    assert documents[0].id == "memory:///collect/a.jsonl#1"
    assert input_files(config("jsonl", "memory://collect/*.jsonl")) == ["memory:///collect/a.jsonl"]
    files.rm("/collect", recursive=True)
    with pytest.raises(ValueError, match="no file of type jsonl, found 1 entries, all of them vanished; give a file"):
        refuse_unreadable(config("jsonl", "memory://collect/a.jsonl"))


def test_a_page_is_decoded_by_header_then_meta_then_detection(tmp_path: Path) -> None:
    german = "Grüße aus Köln, schöne Straße. " * 5
    html = f"<html><meta charset=%s><p>{german}</p></html>"
    bodies = [
        response((html % "x").encode("cp1252"), "Content-Type: text/html; charset=ISO-8859-1"),
        response((html % "cp1251").encode("cp1251", "replace"), "Content-Type: text/html"),
        response((html % "utf-8").encode("latin-1"), "Content-Type: text/html"),
        response((html % "punycode").encode(), "Content-Type: text/html; charset=punycode"),
    ]
    documents, counts, _ = collected("warc", write(tmp_path / "a.warc", b"".join(bodies)))
    assert [german in each.text for each in documents] == [True, False, True, True]
    assert documents[1].text == (html % "cp1251").encode("cp1251", "replace").decode("cp1251")
    assert {name: count for name, count in counts.items() if "mended" in name} == {"mended/charset_detected": 1}


def test_a_response_is_unpacked_and_others_are_counted(tmp_path: Path) -> None:
    body = page("a page")
    chunked = b"".join(f"{len(part):x}\r\n".encode() + part + b"\r\n" for part in (body[:10], body[10:])) + b"0\r\n\r\n"
    html = "Content-Type: text/html"
    records = [
        response(COMPRESSIONS[".gz"](body), html, "Content-Encoding: gzip"),
        response(chunked, html, "Transfer-Encoding: chunked"),
        response(body, html, "Content-Encoding: gzip"),  # already undone
        response(b"\x89PNG", "Content-Type: image/png"),
        response(body, html, status="404 Not Found"),
        response(b"\x0b\x02\x80abc", html, "Content-Encoding: br"),
        record("request", b"GET / HTTP/1.1\r\n\r\n"),
        record("response", b"no headers"),
    ]
    documents, counts, _ = collected("warc", write(tmp_path / "a.warc.gz", COMPRESSIONS[".gz"](b"".join(records))))
    assert [each.text for each in documents] == [body.decode()] * 3
    reasons = {"no_html": 1, "http_status": 1, "http_encoding": 1, "no_response": 1, "http_headers": 1}
    assert dropped(counts) == reasons
    assert documents[0].metadata["url"] == "https://example.org/a"
    assert documents[0].metadata["date"] == "2026-01-02T03:04:05Z" and documents[0].metadata["kind"] == "web"


MIT = (
    b"MIT License\n\nPermission is hereby granted, free of charge, to any person\nobtaining a copy of this software and"
)


def test_code_has_its_language_and_the_nearest_licence(tmp_path: Path) -> None:
    files = {
        "one/LICENSE": MIT,
        "one/deep/inner/a.py": b"pass",
        "one/sub/COPYING": b"GNU GENERAL PUBLIC LICENSE\n Version 3, 29 June 2007",
        "one/sub/b.rs": b"fn main() {}",
        "one/c.c": b"/* SPDX-License-Identifier: BSD-2-Clause */",
        "two/LICENSE.txt": b"Do what I say.",
        "two/Makefile": b"all:",
        "three/x.go": b"package x",
        "three/vendor/y.go": b"package y",
        "three/.git/z.go": b"package z",
        "three/data.bin": b"\0",
    }
    for name, data in files.items():
        write(tmp_path / name, data)
    documents, counts, _ = collected("code", tmp_path, licence=None)
    found = {
        os.path.relpath(d.metadata["file"], tmp_path): (d.metadata["language"], d.metadata["licence"])
        for d in documents
    }
    assert found == {
        "one/deep/inner/a.py": ("python", "MIT"),
        "one/sub/b.rs": ("rust", "GPL-3.0"),
        "one/c.c": ("c", "BSD-2-Clause"),
        "two/Makefile": ("makefile", "other"),
        "three/x.go": ("go", None),
    }
    assert dropped(counts) == {"vendored": 1, "hidden": 1, "other_ending": 4}


DIALOGUES = [
    ({"prompt": "2+2?", "completion": "4"}, "user: 2+2?\n\nassistant: 4"),
    ({"question": "2+2?", "answer": "I add.\n#### 4"}, "user: 2+2?\n\nassistant: I add.\n#### 4"),
    ({"instruction": "Add", "input": "2 2", "output": "4"}, "user: Add\n\n2 2\n\nassistant: 4"),
    (
        {"system": "S", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        "system: S\n\nuser: a\n\nassistant: b",
    ),
    ({"prompt": "p", "chosen": "good", "rejected": "bad"}, "user: p\n\nassistant: good"),
    ({"text": "as it is"}, "as it is"),
]


def test_dialogues_of_every_shape_become_turns_of_text(tmp_path: Path) -> None:
    rows = [json.dumps(row) for row, _ in DIALOGUES]
    for name, data in (("a.jsonl", "\n".join(rows)), ("b.json", f"[{', '.join(rows)}]")):
        documents, counts, _ = collected("dialogue", write(tmp_path / name, data.encode()))
        assert [each.text for each in documents] == [text for _, text in DIALOGUES] and not dropped(counts)
        assert {each.metadata["kind"] for each in documents} == {"dialogue"}
    _, counts, _ = collected("dialogue", write(tmp_path / "c.jsonl", b'{"messages": []}\n{"x": 1}\n'))
    assert dropped(counts) == {"no_dialogue": 2}


@pytest.mark.parametrize("streamed", [False, True])
def test_data_sets_are_read_from_what_datasets_saved_and_what_it_loads(
    streamed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = datasets.Dataset.from_list([{"text": text, "lang": "en"} for text in TEXTS])
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(
        tmp_path / "saved", num_shards={"train": 2, "test": 1}
    )
    saved = config("datasets", tmp_path / "saved")
    refuse_unreadable(saved)
    assert task_count(saved) == 2
    documents, _, _ = collected("datasets", tmp_path / "saved", streamed=streamed)
    assert [each.text for each in documents] == TEXTS and documents[0].metadata["language"] == "en"
    assert [each.text for each in collected("datasets", tmp_path / "saved", split="test")[0]] == TEXTS[:1]
    write(tmp_path / "rows" / "train.jsonl", json_lines())
    documents, _, _ = collected("datasets", tmp_path / "rows", streamed=streamed)
    assert [each.text for each in documents] == TEXTS and documents[1].id == f"{tmp_path / 'rows'}#2"
    with pytest.raises(ValueError, match=r"^data\.collect\.input\.path=.*cannot be loaded by datasets"):
        collected("datasets", tmp_path / "rows", split="absent", streamed=streamed)


def test_what_cannot_be_read_is_refused_before_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "x.bin", b"x")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    cases = {
        tmp_path / "absent.txt": "absent.txt is not there; give a file",
        tmp_path / "pipe": "pipe is no regular file; give a file",
        tmp_path / "gone.txt": "gone.txt is no regular file",
        tmp_path / "empty": "no file of type text, found nothing; give",
        tmp_path: "found 3 entries, all of them link, not_a_file, other_ending; give",
        tmp_path / "*.md": "no file of type text, found nothing",
        "unknown://bucket/a": "it cannot be listed (Protocol not known",
    }
    for path, words in cases.items():
        with pytest.raises(ValueError) as refused:
            refuse_unreadable(config("text", path))
        message = str(refused.value)
        assert message.startswith(f"data.collect.input.path={path}: ") and words in message and "\n" not in message
    monkeypatch.setitem(sys.modules, "pypdf", None)
    with pytest.raises(ValueError, match="type=pdf: it needs pypdf; `pip install"):
        refuse_unreadable(config("pdf", tmp_path))


def test_the_real_archive_gives_its_page(tmp_path: Path) -> None:
    if not (SHARED / "warc").is_dir():
        pytest.skip(f"{SHARED / 'warc'} is not there; LLMTRAIN_DATA names another directory")
    documents, counts, _ = collected("warc", SHARED / "warc" / "whirlwind.warc.gz")
    assert [each.metadata["url"] for each in documents] == ["https://an.wikipedia.org/wiki/Escopete"]
    assert dropped(counts) == {"no_response": 3} and documents[0].text.startswith("<!DOCTYPE html>")
    documents, counts, _ = collected("wet", SHARED / "warc")
    assert [each.text[:22] for each in documents] == ["Escopete - Biquipedia,"]
