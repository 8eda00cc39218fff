"""A store: what it holds, what is found in it, and what of it is refused."""

from __future__ import annotations

import json
import shutil
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtrain.config.index import IndexConfig
from llmtrain.data.search import store as module
from llmtrain.data.search.build import build, identity, listed_files
from llmtrain.data.search.encoder import Encoder
from llmtrain.data.search.store import Passage, Store, fused, open_store, top
from llmtrain.observe.owned import replacing

pytest.importorskip("bm25s", reason="the extra `search` installs it")

TEXTS = ["the cat sat", "the dog sat on the dog", "birds"]


def made(folder: Path, texts: list[str], **keys: Any) -> str:
    """Returns the directory of a store of rows with ids 0, 1, 2, ..."""
    rows = [{"id": i, "text": text} for i, text in enumerate(texts)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    entry = {"path": f"{folder}/rows.jsonl", "id_field": "id"}
    index = IndexConfig.model_validate({"documents": [entry], **keys})
    files = listed_files(index)
    with replacing(folder / "store", "llmtrain index") as directory:
        build(index, files, identity(index, files), directory, "cpu")
    return str(folder / "store")


def found(store: Store, question: str, k: int = 9) -> list[tuple[str, float]]:
    return [(hit.passage.document, hit.score) for hit in store.search(question, k)]


def test_search_gives_passages_by_their_bm25(tmp_path: Path) -> None:
    store = open_store(made(tmp_path, TEXTS))
    idf = log(1 + 1.5 / 2.5)  # "the" and "sat" stand in 2 of 3 texts, which have 10 / 3 words in the mean
    short, long = 1 + 1.2 * (0.25 + 0.75 * 0.9), 2 + 1.2 * (0.25 + 0.75 * 1.8)
    assert store.mode == "bm25" and len(store) == 3
    assert found(store, "the") == [("1", pytest.approx(idf * 2 / long)), ("0", pytest.approx(idf / short))]
    assert [name for name, _ in found(store, "sat", 1)] == ["0"]
    assert found(store, "zebra") == [] and found(store, "") == []
    passage = store.search("birds", 1)[0].passage
    where = f"{tmp_path}/rows.jsonl:3"
    assert passage == Passage(2, "2", where, None, 0, 5, "birds")
    assert passage.source == f"2 ({where}), characters 0 to 5"


def test_equal_scores_come_in_the_order_of_the_store() -> None:
    scores = np.array([1, 3, 3, 0, 3], np.float32)
    assert top(scores, np.arange(5), 2) == [(1, 3.0), (2, 3.0)]
    assert top(scores, np.flatnonzero(scores), 9) == [(1, 3.0), (2, 3.0), (4, 3.0), (0, 1.0)]


def test_ranks_are_joined_by_their_reciprocals() -> None:
    lists = [[(5, 9.0), (2, 8.0)], [(2, 0.7), (7, 0.1)]]
    assert fused(lists) == [(2, 1 / 62 + 1 / 61), (5, 1 / 61), (7, 1 / 62)]
    assert fused([[(4, 1.0)], [(3, 1.0)]]) == [(3, 1 / 61), (4, 1 / 61)]


def test_embeddings_are_compared_by_their_cosine(tmp_path: Path, encoder_directory: Path) -> None:
    directory = made(tmp_path, TEXTS, model=str(encoder_directory), passage_prefix="a ", query_prefix="on ")
    import torch

    encoder = Encoder(str(encoder_directory), torch.device("cpu"))
    rows = encoder.embed([f"a {text}" for text in TEXTS], 1)[0]
    wanted = rows @ encoder.embed(["on the bird"], 1)[0][0]
    got = dict(found(open_store(directory, "embedding"), "the bird"))
    assert [got[name] for name in "012"] == pytest.approx(wanted.tolist(), abs=1e-5)
    order = [name for name, _ in found(open_store(directory, "embedding"), "the bird")]
    both = found(open_store(directory), "cat")  # bm25 finds 0 alone
    by_meaning = [name for name, _ in found(open_store(directory, "embedding"), "cat")]
    assert order == [str(i) for i in np.argsort(-wanted)]
    expected = {name: 1 / (61 + by_meaning.index(name)) + (1 / 61 if name == "0" else 0) for name in "012"}
    assert dict(both) == pytest.approx(expected)


def test_passages_overlap_and_tell_their_places(tmp_path: Path, encoder_directory: Path) -> None:
    shutil.copy(encoder_directory / "tokenizer.json", tmp_path)
    keys = {"unit": "tokens", "passage_size": 3, "passage_overlap": 1, "tokenizer": str(tmp_path)}
    store = open_store(made(tmp_path, ["cats sat on the dog", " ", "a bird"], **keys))
    # "cats" is two tokens, cat and ##s
    assert [store.passage(i).text for i in range(len(store))] == ["cats sat", "sat on the", "the dog", "a bird"]
    assert [store.passage(i).start for i in range(4)] == [0, 5, 12, 0]
    assert store.manifest["documents"] == 3 and store.manifest["empty_documents"] == 1


def test_what_is_no_whole_store_is_refused(tmp_path: Path, encoder_directory: Path) -> None:
    directory = Path(made(tmp_path, TEXTS, model=str(encoder_directory)))

    def refused(match: str, mode: Any = "bm25") -> None:
        with pytest.raises(ValueError, match=match):
            open_store(str(directory), mode)

    with pytest.raises(ValueError, match=r"is no store; make one with `llmtrain index`"):
        open_store(str(tmp_path))
    whole = (directory / "bm25.safetensors").read_bytes()
    (directory / "bm25.safetensors").write_bytes(whole[:-1] + b"x")
    refused(r"bm25.safetensors: not as it was written; remove or move .*/store, then run `llmtrain index` again")
    (directory / "bm25.safetensors").write_bytes(whole)
    (directory / "offsets.npy").rename(tmp_path / "offsets.npy")
    refused(r"offsets.npy: not as it was written")
    (tmp_path / "offsets.npy").rename(directory / "offsets.npy")
    open_store(str(directory), "bm25").search("cat", 1)
    (directory / ".llmtrain.json").write_text("{}")
    refused("does not list the files of a store; remove or move .*/store, then")


def test_an_encoder_that_is_gone_or_another_is_refused(tmp_path: Path, encoder_directory: Path) -> None:
    copy = tmp_path / "bert"
    shutil.copytree(encoder_directory, copy)
    directory = made(tmp_path, TEXTS, model=str(copy))
    assert open_store(directory).mode == "hybrid"
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    with pytest.raises(ValueError, match="the encoder is another than that of the store; index again"):
        open_store(directory)
    shutil.rmtree(copy)
    with pytest.raises(ValueError, match="the encoder of the store is gone"):
        open_store(directory)
    assert found(open_store(directory, "bm25"), "birds")[0][0] == "2"
    with pytest.raises(ValueError, match=r"made without index.model, so it has no embeddings; search it by bm25"):
        open_store(made(tmp_path, TEXTS), "hybrid")


def test_a_store_of_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = made(tmp_path, TEXTS)
    monkeypatch.setattr(module, "FORMAT", 2)
    with pytest.raises(ValueError, match="is a store of format 1, this version reads 2; index again"):
        open_store(directory)
