from __future__ import annotations

from pathlib import Path

import pytest

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
