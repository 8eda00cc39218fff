"""Checksums see every change of a file, and read an unchanged file once."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from llmtrain.observe import contents
from llmtrain.observe.contents import Checksums, file_digest, files_at


def settle(path: Path) -> None:
    """Makes a file look as if it had lain there for long."""
    os.utime(path, ns=(10**18, 10**18))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are read."""
    found: list[str] = []
    real = contents.file_digest
    monkeypatch.setattr(contents, "file_digest", lambda path: found.append(Path(path).name) or real(path))
    monkeypatch.setattr(contents, "SETTLED_NS", -1)  # the change of a test's file is always recent
    return found


def test_a_checksum_is_that_of_sha256sum(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert file_digest(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest() == Checksums().of(str(tmp_path / "a"))


def test_an_unchanged_file_is_read_once(tmp_path: Path, reads: list[str]) -> None:
    path, cache = tmp_path / "a", str(tmp_path / "cache")
    path.write_bytes(b"abc")
    for _ in range(3):
        checksums = Checksums(cache)
        first = checksums.of(str(path))
        checksums.save()
    assert reads == ["a"]
    path.write_bytes(b"abd")
    os.utime(path, ns=(path.stat().st_atime_ns, 5))
    assert Checksums(cache).of(str(path)) != first


def test_the_same_size_and_time_is_not_enough(tmp_path: Path, reads: list[str]) -> None:
    """A file that was exchanged for another one with its time (cp -p, rsync -t)."""
    path, other = tmp_path / "a", tmp_path / "b"
    path.write_bytes(b"abc")
    other.write_bytes(b"abd")
    settle(path)
    settle(other)
    checksums = Checksums()
    first = checksums.of(str(path))
    os.replace(other, path)
    assert path.stat().st_mtime_ns == 10**18 and checksums.of(str(path)) != first


def test_a_file_changed_just_now_is_read_again(tmp_path: Path) -> None:
    """Its time may be that of the next change, too."""
    (tmp_path / "a").write_bytes(b"abc")
    checksums = Checksums()
    checksums.of(str(tmp_path / "a"))
    assert checksums.known == {}


@pytest.mark.parametrize("cache", ["{", "[]", '{"a": 3}', '{"a": []}'])
def test_a_broken_cache_is_no_obstacle(tmp_path: Path, cache: str) -> None:
    (tmp_path / "cache").write_text(cache)
    (tmp_path / "a").write_bytes(b"abc")
    assert Checksums(str(tmp_path / "cache")).of(str(tmp_path / "a")) == hashlib.sha256(b"abc").hexdigest()


def test_where_the_cache_cannot_be_written(tmp_path: Path, reads: list[str]) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    checksums = Checksums(str(tmp_path / "no" / "folder"))
    checksums.of(str(tmp_path / "a"))
    checksums.save()
    assert reads == ["a"]


def test_of_large_files_blocks_over_the_whole_length_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "WHOLE_BYTES", 10)
    monkeypatch.setattr(contents, "BLOCKS", 3)
    monkeypatch.setattr(contents, "BLOCK_BYTES", 4)
    seen = {}
    for at in (None, 0, 3, 48, 51, 96, 99, "shorter"):
        data = bytearray(100 if at != "shorter" else 99)
        if isinstance(at, int):
            data[at] = 1
        (tmp_path / "a").write_bytes(data)
        seen[at] = file_digest(tmp_path / "a")
    assert len(set(seen.values())) == len(seen)


def test_names_and_files_of_a_directory_count(tmp_path: Path) -> None:
    def digest() -> str:
        return Checksums().of_all(files_at(str(tmp_path)))

    seen = []
    for name, text in (("a", "1"), ("b", "1"), ("b", "2"), ("deep", None), ("deep/c", "3")):
        (tmp_path / name).mkdir() if text is None else (tmp_path / name).write_text(text)
        seen.append(digest())
    assert len(set(seen)) == 4 and seen[2] == seen[3]  # an empty folder is nothing


def test_which_files_a_path_means(tmp_path: Path) -> None:
    for name in ("x[1]/a", "x[1]/deep/b", "y.jsonl", "z.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")

    def names(path: str) -> list[str]:
        return [os.path.relpath(file, tmp_path) for file in files_at(str(tmp_path / path))]

    assert names("x[1]") == ["x[1]/a", "x[1]/deep/b"] and names("*.jsonl") == ["y.jsonl", "z.jsonl"]
    assert names("y.jsonl") == ["y.jsonl"] and names("nothing") == []
