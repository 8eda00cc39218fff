from __future__ import annotations

import gzip
import json
import random
import tracemalloc
from pathlib import Path

import pytest
import zstandard

from llmtrain.config.schema import SourceConfig
from llmtrain.data.collect import documents


def texts(seed: int = 0, **fields: object) -> list[str]:
    return list(documents(SourceConfig(name="s", **fields), seed))


def test_stdlib_is_shuffled_by_the_seed_and_stops_at_max_bytes() -> None:
    first, other = texts(type="stdlib", max_bytes=100_000), texts(1, type="stdlib", max_bytes=100_000)
    assert 99_990 < sum(len(t.encode()) for t in first) <= 100_000
    assert first == texts(type="stdlib", max_bytes=100_000)
    assert first != other


def test_topics_are_prose() -> None:
    assert len(texts(type="topics")) > 50


def test_text_reads_files_directories_and_globs(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "deep" / "b.txt").write_text("two")
    (tmp_path / "c.md").write_text(" \n")
    assert sorted(texts(type="text", path=str(tmp_path))) == ["one", "two"]
    assert texts(type="text", path=str(tmp_path / "a.txt")) == ["one"]
    assert texts(type="text", path=str(tmp_path / "*.txt")) == ["one"]
    (tmp_path / "[x]*.txt").write_text("named")
    assert texts(type="text", path=str(tmp_path / "[x]*.txt")) == ["named"]


def test_jsonl_gives_every_line_once_in_a_seeded_order(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text("".join(f'{{"text": "dé{i}"}}\n\n' for i in range(30)), encoding="utf-8")
    found = texts(type="jsonl", path=str(path))
    assert sorted(found) == sorted(f"dé{i}" for i in range(30))
    assert found != texts(1, type="jsonl", path=str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": \n', r"d.jsonl:2: not valid JSON"),
        (b'{"text": "a"}\n[1]\n', r"d.jsonl:2: expected a JSON object, found list"),
        (b'{"txt": "a"}\n', r"d.jsonl:1: missing field 'text'; found 'txt'"),
        (b'{"text": 3}\n', r"d.jsonl:1: field 'text' must be a string, found int"),
        (b'{"text": "\xff"}\n', r"d.jsonl:1: not UTF-8"),
        (b"\n", "data source 's' .* is empty"),
    ],
)
def test_broken_jsonl_names_file_and_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "d.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        texts(type="jsonl", path=str(tmp_path / "d.jsonl"))


def test_all_broken_lines_and_files_are_told_at_once(tmp_path: Path) -> None:
    good = '{"text": "a"}'
    for name, bad in (("a", 3), ("b", 30)):
        lines = ['{"text": "\\ud800"}' if i < bad else good for i in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError) as error:
        texts(type="jsonl", path=str(tmp_path / "*.jsonl"))
    lines = str(error.value).splitlines()
    assert len(lines) == 21 and lines[-1] == "data source 's': 33 faults, of which the first 20 are shown"
    assert lines[0].startswith(f"{tmp_path}/a.jsonl:1: field 'text' has half a character (\\ud800")
    (tmp_path / "t").mkdir()
    for i in range(3):
        (tmp_path / "t" / f"{i}.txt").write_bytes(b"\xff" if i else b"fine")
    with pytest.raises(ValueError, match=r"(?s)1.txt: not UTF-8 text .*2.txt: not UTF-8 text .*: 2 faults"):
        texts(type="text", path=str(tmp_path / "t"))


def test_rows_are_documents_too(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("body,more\none,1\ntwo,2\n")
    assert sorted(texts(type="rows", path=str(tmp_path / "x.csv"), field="body")) == ["one", "two"]
    with pytest.raises(
        ValueError, match=r"x.csv:2: missing field 'text'; found 'body', 'more'; name yours with its key"
    ):
        texts(type="rows", path=str(tmp_path / "x.csv"))
    (tmp_path / "x.jsonl").write_text('\ufeff{"body": "one"}\n{"body": "two"}\n')
    assert sorted(texts(type="jsonl", path=str(tmp_path / "x.jsonl"), field="body")) == ["one", "two"]


def test_compressed_text_and_byte_order_marks(tmp_path: Path) -> None:
    (tmp_path / "x.txt.gz").write_bytes(gzip.compress("\ufeffone\r\n".encode()))
    assert texts(type="text", path=str(tmp_path / "x.txt.gz")) == ["one\r\n"]


def test_missing_and_empty_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no file at"):
        texts(type="text", path=str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="needs a path"):
        texts(type="text")
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(ValueError, match="empty"):
        texts(type="text", path=str(tmp_path))
    (tmp_path / "x.txt").write_bytes(b"ok \xff")
    with pytest.raises(ValueError, match=r"x.txt: not UTF-8 text \(byte 3\)"):
        texts(type="text", path=str(tmp_path))


def write_cleaned(path: Path, texts: list[str], frames: int = 1) -> None:
    """Writes a file as cleaning does, in several frames if asked for."""
    path.parent.mkdir(exist_ok=True, parents=True)
    lines = [json.dumps({"text": text, "id": str(i), "metadata": {}}) + "\n" for i, text in enumerate(texts)]
    parts = ["".join(lines[i::frames]) for i in range(frames)]
    path.write_bytes(b"".join(zstandard.compress(part.encode()) for part in parts))


def test_cleaned_documents_stream_file_by_file(tmp_path: Path) -> None:
    for file in range(6):
        write_cleaned(tmp_path / f"{file:05}.jsonl.zst", [f"{file}é{i}" for i in range(4)], frames=1 + file % 2)
    found = texts(type="cleaned", path=str(tmp_path))
    assert sorted(found) == sorted(f"{file}é{i}" for file in range(6) for i in range(4))
    files = [text[0] for text in found[::4]]
    assert (
        sorted(files) == list("012345")
        and files != list("012345")
        and found == texts(type="cleaned", path=str(tmp_path))
    )
    assert files != [text[0] for text in texts(1, type="cleaned", path=str(tmp_path))[::4]]


def test_cleaned_documents_are_held_one_at_a_time(tmp_path: Path) -> None:
    """20 MB of text, of which a document has 100 kB."""
    write_cleaned(tmp_path / "0.jsonl.zst", [random.Random(i).randbytes(50_000).hex() for i in range(200)])
    tracemalloc.start()
    found = sum(len(text) for text in documents(SourceConfig(name="s", type="cleaned", path=str(tmp_path)), 0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == 20_000_000 and peak < 2_000_000


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        ("cut", r"0.jsonl.zst: not a whole .zst file \(cut short\); write it again"),
        ("other", r"0.jsonl.zst: not a whole .zst file \(.*\); write it again"),
        ("json", r"0.jsonl.zst:2: not valid JSON"),
        ("none", r"no \*.jsonl.zst below .*; clean documents with `llmtrain data` and data.collect first"),
    ],
)
def test_broken_cleaned_documents_are_told(tmp_path: Path, harm: str, message: str) -> None:
    path = tmp_path / "0.jsonl.zst"
    write_cleaned(path, ["one", "two"])
    if harm == "cut":
        path.write_bytes(path.read_bytes()[:-3])
    elif harm == "other":
        path.write_text('{"text": "not compressed"}\n')
    elif harm == "json":
        path.write_bytes(zstandard.compress(b'{"text": "a"}\n{"text": \n'))
    else:
        path.unlink()
    with pytest.raises(ValueError, match=message):
        texts(type="cleaned", path=str(tmp_path))
