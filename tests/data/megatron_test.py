"""Shards in Megatron's form, read by the format's description, and by Megatron itself where it is installed."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from llmtrain.config.schema import DataConfig, SourceConfig, TokenizerConfig
from llmtrain.data.megatron import export_megatron, index
from llmtrain.data.prepare import prepare
from llmtrain.data.shards import open_shards


def read_index(path: Path) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    """Type, lengths, first bytes and documents, as the description of the format has them."""
    content = path.read_bytes()
    assert content[:9] == b"MMIDIDX\x00\x00"
    version, code, sequences, documents = struct.unpack_from("<QBQQ", content, 9)
    assert version == 1
    at = 9 + 8 + 1 + 8 + 8
    lengths = np.frombuffer(content, "<i4", sequences, at)
    starts = np.frombuffer(content, "<i8", sequences, at + 4 * sequences)
    first = np.frombuffer(content, "<i8", documents, at + 12 * sequences)
    assert len(content) == at + 12 * sequences + 8 * documents
    return np.dtype({8: "uint16", 4: "int32"}[code]), lengths, starts, first


def test_an_index_by_hand(tmp_path: Path) -> None:
    (tmp_path / "x.idx").write_bytes(index(np.array([0, 3, 7]), "uint32"))
    dtype, lengths, starts, documents = read_index(tmp_path / "x.idx")
    assert (dtype, lengths.tolist(), starts.tolist(), documents.tolist()) == (np.int32, [3, 4], [0, 12], [0, 1, 2])


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("megatron")
    data = DataConfig(sources=[SourceConfig(name="topics", type="topics", max_bytes=60_000)], megatron=True)
    prepare(data, TokenizerConfig(vocab_size=400), str(base / "data"), str(base / "tokenizer"), 0)
    return base


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_every_document_comes_back(exported: Path, split: str) -> None:
    stem = exported / "data" / f"topics-{split}_text_document"
    dtype, lengths, starts, documents = read_index(Path(f"{stem}.idx"))
    tokens = Path(f"{stem}.bin").read_bytes()
    reader = open_shards(str(exported / "data"), split)["topics"]
    assert dtype == np.uint16 and documents.tolist() == list(range(len(lengths) + 1)) and len(lengths) > 1
    for number, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        document = np.frombuffer(tokens, dtype, length, start)
        assert np.array_equal(document, reader.tokens[reader.offsets[number] : reader.offsets[number + 1]])


def test_it_takes_no_room_and_is_made_when_it_is_asked_for(exported: Path, tmp_path: Path) -> None:
    names = [exported / "data" / f"topics-train{end}" for end in (".bin", "_text_document.bin")]
    assert os.path.samefile(*names)
    data = DataConfig(sources=[SourceConfig(name="topics", type="topics", max_bytes=60_000)])
    places = (str(tmp_path / "data"), str(exported / "tokenizer"))
    prepare(data, TokenizerConfig(vocab_size=400), *places, 0)
    assert not list(tmp_path.rglob("*.idx"))
    for _ in range(2):
        prepare(data.model_copy(update={"megatron": True}), TokenizerConfig(vocab_size=400), *places, 0)
        assert len(list(tmp_path.rglob("*.idx"))) == 2


def test_files_of_the_users_stay(exported: Path, tmp_path: Path) -> None:
    for name in ("shards.json", "topics-train.bin", "topics-train.offsets.npy"):
        os.link(exported / "data" / name, tmp_path / name)
    for name in ("topics-held_out.bin", "topics-held_out.offsets.npy"):
        os.link(exported / "data" / name, tmp_path / name)
    (tmp_path / "topics-train_text_document.bin").write_text("mine")
    with pytest.raises(ValueError, match=r"holds topics-train_text_document.bin, which llmtrain did not write"):
        export_megatron(str(tmp_path))
    assert (tmp_path / "topics-train_text_document.bin").read_text() == "mine"


@pytest.mark.filterwarnings("ignore")
def test_megatron_reads_it(exported: Path) -> None:
    """With IndexedDataset of megatron-core (0.16.1 when this was written)."""
    theirs = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    for split in ("train", "held_out"):
        data = theirs.IndexedDataset(str(exported / "data" / f"topics-{split}_text_document"))
        reader = open_shards(str(exported / "data"), split)["topics"]
        assert len(data) == len(reader.offsets) - 1 and data.index.dtype == np.uint16
        assert data.document_indices.tolist() == list(range(len(data) + 1))
        for number in range(len(data)):
            ours = reader.tokens[reader.offsets[number] : reader.offsets[number + 1]]
            assert np.array_equal(data[number], ours)
        assert np.array_equal(data.get(0, offset=2, length=3), reader.tokens[2:5])
    assert json.loads((exported / "data" / "shards.json").read_text())["dtype"] == "uint16"
