"""Tokenizing in pieces: what a kill left is gone on with, the bytes are the same for any number of processes."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from llmtrain.config.schema import SourceConfig
from llmtrain.data import pieces, shards
from llmtrain.data.shards import verify_shards, write_shards
from llmtrain.data.tokenizer import Tokenizer


@pytest.fixture
def sources(tmp_path: Path) -> list[SourceConfig]:
    made = []
    for name in ("a", "b"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps({"text": f"{name}{i} " * (1 + i % 40)}) for i in range(400)))
        made.append(SourceConfig(name=name, type="jsonl", path=str(path), held_out=0.1))
    return made


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pieces, whose files are not waited for: a disk may take long."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 8_000)
    monkeypatch.setattr(pieces, "BATCH_BYTES", 2_000)


def shard_bytes(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.name.endswith((".bin", ".npy", "shards.json"))}


def die_after(text_bytes: int) -> Callable[[str, int], None]:
    def progress(source: str, done: int) -> None:
        if source == "b" and done >= text_bytes:
            raise KeyboardInterrupt

    return progress


def encoded_bytes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collects how much text is tokenized."""
    sizes: list[int] = []
    real = pieces.encode

    def encode(tokenizer: Tokenizer, dtype: str, batch: list[tuple[str, str]]) -> pieces.Parts:
        sizes.append(sum(len(text.encode()) for _, text in batch))
        return real(tokenizer, dtype, batch)

    monkeypatch.setattr(pieces, "encode", encode)
    return sizes


def test_a_killed_run_goes_on_behind_its_last_piece(
    sources: list[SourceConfig], tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(sources, tokenizer, str(tmp_path / "whole"), 0)
    with pytest.raises(KeyboardInterrupt):
        write_shards(sources, tokenizer, str(tmp_path / "cut"), 0, die_after(30_000))
    sizes = encoded_bytes(monkeypatch)
    write_shards(sources, tokenizer, str(tmp_path / "cut"), 0)
    assert shard_bytes(tmp_path / "cut") == shard_bytes(tmp_path / "whole")
    all_bytes = sum(
        counts["bytes"] for counts in json.loads((tmp_path / "whole/shards.json").read_text())["sources"]["b"].values()
    )
    assert (
        all_bytes - 30_000 <= sum(sizes) < all_bytes - 30_000 + 8_000 + 2 * 2_000
    )  # at most a piece again, none of `a`


@pytest.mark.parametrize("harm", ["behind", "inside", "journal", "lengths", "missing"])
def test_only_whole_pieces_are_gone_on_with(
    sources: list[SourceConfig], tokenizer: Tokenizer, tmp_path: Path, harm: str
) -> None:
    write_shards(sources, tokenizer, str(tmp_path / "whole"), 0)
    with pytest.raises(KeyboardInterrupt):
        write_shards(sources, tokenizer, str(tmp_path / "cut"), 0, die_after(30_000))
    bin_file, journal = tmp_path / "cut/b-train.bin", tmp_path / "cut/b.pieces.jsonl"
    lengths = tmp_path / "cut/b-train.lengths"
    if harm == "behind":
        bin_file.write_bytes(bin_file.read_bytes() + b"half a piece")
    elif harm == "inside":
        content = bytearray(bin_file.read_bytes())
        content[len(content) // 2] ^= 1
        bin_file.write_bytes(content)
    elif harm == "journal":
        journal.write_text(journal.read_text()[:-40])
    elif harm == "lengths":
        lengths.write_bytes(lengths.read_bytes()[:100])
    else:
        bin_file.unlink()
    write_shards(sources, tokenizer, str(tmp_path / "cut"), 0)
    assert shard_bytes(tmp_path / "cut") == shard_bytes(tmp_path / "whole")


@pytest.mark.parametrize("change", ["seed", "contents", "source"])
def test_pieces_of_something_else_are_not_gone_on_with(
    sources: list[SourceConfig], tokenizer: Tokenizer, tmp_path: Path, change: str
) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_shards(sources, tokenizer, str(tmp_path / "cut"), 0, die_after(30_000), contents="x")
    linked = tmp_path / "linked"
    os.link(tmp_path / "cut/a-train.bin", linked)
    before = linked.read_bytes()
    now = [s.model_copy(update={"max_bytes": 9_000}) for s in sources] if change == "source" else sources
    seed, contents = int(change == "seed"), "y" if change == "contents" else "x"
    write_shards(now, tokenizer, str(tmp_path / "cut"), seed, contents=contents)
    write_shards(now, tokenizer, str(tmp_path / "whole"), seed, contents=contents)
    assert shard_bytes(tmp_path / "cut") == shard_bytes(tmp_path / "whole")
    assert linked.read_bytes() == before  # another name of the file, in the data directory, keeps what it had


def test_processes_write_the_same_bytes(sources: list[SourceConfig], tokenizer: Tokenizer, tmp_path: Path) -> None:
    for workers in (1, 3):
        write_shards(sources, tokenizer, str(tmp_path / str(workers)), 0, workers=workers)
    assert shard_bytes(tmp_path / "1") == shard_bytes(tmp_path / "3")


def test_a_process_that_is_killed_is_an_error(
    sources: list[SourceConfig], tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill_one(source: str, done: int) -> None:
        if not killed:
            killed.append(next(iter(pools[0]._processes)))
            os.kill(killed[0], signal.SIGKILL)

    killed: list[int] = []
    pools: list = []
    pool_class = pieces.ProcessPoolExecutor
    monkeypatch.setattr(pieces, "ProcessPoolExecutor", lambda *args: pools.append(pool_class(*args)) or pools[0])
    with pytest.raises(RuntimeError, match="a process that tokenizes has ended before its work"):
        write_shards(sources, tokenizer, str(tmp_path / "s"), 0, kill_one, workers=2)
    write_shards(sources, tokenizer, str(tmp_path / "s"), 0)
    verify_shards(str(tmp_path / "s"))


def test_checksums_are_those_of_the_files(sources: list[SourceConfig], tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_shards(sources, tokenizer, str(tmp_path), 0)
    known = json.loads((tmp_path / "shards.json").read_text())["sha256"]
    assert len(known) == 8
    assert known == {name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in known}
    verify_shards(str(tmp_path))
    path = tmp_path / "b-train.bin"
    content = bytearray(path.read_bytes())
    content[100] ^= 1  # the size stays
    path.write_bytes(content)
    shards.open_shards(str(tmp_path), "train")
    with pytest.raises(ValueError, match=r"b-train.bin: is not what shards.json says of it, or missing; delete"):
        verify_shards(str(tmp_path))
    manifest = json.loads((tmp_path / "shards.json").read_text())
    (tmp_path / "shards.json").write_text(json.dumps({k: v for k, v in manifest.items() if k != "sha256"}))
    with pytest.raises(ValueError, match=r"without checksums to verify; make the shards anew, or set"):
        verify_shards(str(tmp_path))
