from __future__ import annotations

import json
import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from llmtrain.config.schema import DataConfig, SourceConfig
from llmtrain.data.ahead import Ahead
from llmtrain.data.mix import MixSettings
from llmtrain.data.objectives import Objectives
from llmtrain.data.packing import Demonstrations, TextRows, best_fit
from llmtrain.data.shards import SPLITS, open_shards, write_shards
from llmtrain.data.tokenizer import Tokenizer
from llmtrain.types import IGNORE

T = 16


@pytest.fixture(scope="module")
def shards(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("shards")
    for name, count in (("a", 40), ("b", 20)):
        lines = [json.dumps({"text": f"{name}{i} " * (1 + i % 5)}) for i in range(count)]
        (directory / f"{name}.jsonl").write_text("\n".join(lines))
    sources = [
        SourceConfig(name=n, type="jsonl", path=str(directory / f"{n}.jsonl"), held_out=h)
        for n, h in (("a", 0.3), ("b", 0.0))
    ]
    write_shards(sources, tokenizer, str(directory), 0)
    return str(directory)


def test_an_epoch_trains_every_token_once(shards: str) -> None:
    rows = TextRows(shards, "train", T, seed=0, mask_documents=False, weights={"a": 1e-9 + 1, "b": 1.0})
    tokens = open_shards(shards, "train")["a"].tokens
    starts = {tuple(tokens[i : i + T + 1].tolist()): i for i in range(0, len(tokens) - T, T)}
    batch = rows.batch(range(500))
    found = [(*x, y[-1]) for x, y in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True)]
    assert {starts[f] for f in found if f in starts} == set(range(0, rows.rows["a"] * T, T))
    assert torch.equal(batch.input_ids[:, 1:], batch.labels[:, :-1])
    assert batch.loss_mask.all()
    assert batch.segment_ids is None
    assert torch.equal(batch.positions[3], torch.arange(T))


def test_documents_are_kept_apart(shards: str, tokenizer: Tokenizer) -> None:
    plain = TextRows(shards, "train", T, 0, mask_documents=False).batch(range(20))
    batch = TextRows(shards, "train", T, 0, mask_documents=True).batch(range(20))
    assert torch.equal(batch.input_ids, plain.input_ids)
    eos = tokenizer.eos_id
    for ids, labels, after, mask, segments, positions in zip(
        *(x.tolist() for x in (batch.input_ids, batch.labels, plain.labels, batch.loss_mask)),
        batch.segment_ids.tolist(),
        batch.positions.tolist(),
        strict=True,
    ):
        segment = position = 0
        for t in range(T):
            assert (segments[t], positions[t]) == (segment, position)
            assert mask[t] == (ids[t] != eos)
            assert labels[t] == (IGNORE if ids[t] == eos else after[t])
            segment, position = (segment + 1, 0) if ids[t] == eos else (segment, position + 1)
    assert batch.segment_ids.max() > 0


def test_samples_depend_on_seed_and_number_only(shards: str) -> None:
    rows = TextRows(shards, "train", T, 0, True, {"a": 3.0, "b": 1.0})
    whole = rows.batch(range(100, 108)).input_ids
    again = TextRows(shards, "train", T, 0, True, {"a": 3.0, "b": 1.0})
    parts = [again.batch(range(100 + rank, 108, 2)).input_ids for rank in (1, 0)]
    assert torch.equal(whole[1::2], parts[0])
    assert torch.equal(whole[0::2], parts[1])
    other = TextRows(shards, "train", T, 1, True, {"a": 3.0, "b": 1.0})
    assert not torch.equal(whole, other.batch(range(100, 108)).input_ids)


def counted_shards(directory: Path) -> str:
    """Writes shards whose tokens count up, and returns their directory. In rows of 4 tokens, source `a` has 5, which
    begin with 0, 4, .., 16, and source `b` has 3, which begin with 100, 104 and 108."""
    counts = {}
    for name, tokens in (("a", np.arange(21)), ("b", 100 + np.arange(13))):
        for split in SPLITS:
            (directory / f"{name}-{split}.bin").write_bytes(tokens.astype("uint16").tobytes())
            np.save(directory / f"{name}-{split}.offsets.npy", np.array([0, len(tokens)]))
        counts[name] = {split: {"documents": 1, "tokens": len(tokens), "bytes": 1} for split in SPLITS}
    manifest = {"tokenizer": "", "eos_id": 999, "dtype": "uint16", "sources": counts}
    (directory / "shards.json").write_text(json.dumps(manifest))
    return str(directory)


def first_tokens(directory: str, split: str, seed: int) -> list[int]:
    """The first token of each of the samples 0 to 15, which are two epochs of the 8 rows."""
    rows = TextRows(directory, split, 4, seed, mask_documents=False)
    return rows.batch(range(16)).input_ids[:, 0].tolist()


def test_which_rows_come_when_does_not_change(tmp_path: Path) -> None:
    """A run that resumes needs the same rows from every later version. The seed decides which source comes next, and
    the order of its rows in each of its epochs."""
    directory = counted_shards(tmp_path)
    assert first_tokens(directory, "train", seed=0) == [8, 100, 8, 108, 104, 8, 12, 12, 4, 100, 8, 100, 0, 12, 12, 100]
    assert first_tokens(directory, "train", seed=1) == [8, 100, 4, 4, 108, 100, 12, 12, 8, 8, 12, 8, 104, 104, 16, 104]
    held_out = [8, 100, 12, 104, 4, 16, 0, 108, 100, 16, 104, 0, 108, 8, 12, 4]  # whatever the seed
    assert [first_tokens(directory, "held_out", seed) for seed in (0, 1)] == [held_out] * 2


def test_sources_are_mixed_by_size_or_by_weight_and_their_rows_evenly(tmp_path: Path) -> None:
    directory = counted_shards(tmp_path)
    for weights, shares in ((None, (625, 375)), ({"a": 9.0, "b": 1.0}, (900, 100))):
        rows = TextRows(directory, "train", 4, 0, False, weights)
        counts = Counter(rows.batch(range(1000)).input_ids[:, 0].tolist())
        for first, number, share in ((0, 5, shares[0]), (100, 3, shares[1])):
            times = [counts.pop(first + 4 * row) for row in range(number)]
            assert sum(times) == share and max(times) - min(times) <= 1
        assert not counts


def test_shorter_rows_are_the_pieces_of_the_longer_in_their_order(shards: str) -> None:
    whole, pieces = (TextRows(shards, "train", T, 0, mask_documents=False) for _ in range(2))
    for seq_len in (1, 4, 8, T):
        n = T // seq_len
        batch = pieces.batch(range(20 * n, 28 * n), seq_len)
        assert batch.input_ids.shape == (8 * n, seq_len)
        assert torch.equal(batch.input_ids.view(8, T), whole.batch(range(20, 28)).input_ids)
        assert torch.equal(batch.labels.view(8, T), whole.batch(range(20, 28)).labels)
        assert torch.equal(batch.positions[-1], torch.arange(seq_len))


@pytest.mark.parametrize("mask_documents", [True, False])
def test_rearranged_documents_keep_their_place(shards: str, tokenizer: Tokenizer, mask_documents: bool) -> None:
    """A row of documents under both objectives against the same row as plain text."""
    width = 128
    chosen = DataConfig(fim_share=0.5, span_share=0.5)
    fim_ids, span_ids = (500, 501, 502), tuple(range(600, 700))
    rearranged = Objectives(chosen, fim_ids, span_ids, tokenizer.eos_id, seed=3)
    plain = TextRows(shards, "train", width, 0, mask_documents).batch(range(8))
    rows = TextRows(shards, "train", width, 0, mask_documents, objectives=rearranged)
    batch = rows.batch(range(8))
    assert torch.equal(batch.positions, plain.positions)
    ends = plain.input_ids == tokenizer.eos_id
    assert torch.equal(batch.input_ids == tokenizer.eos_id, ends) and 8 < ends.sum() < 80
    if mask_documents:
        assert torch.equal(batch.segment_ids, plain.segment_ids)
        assert not batch.loss_mask[ends].any()
    assert torch.equal(batch.loss_mask, batch.labels != IGNORE)
    trained = batch.loss_mask[:, :-1]
    assert torch.equal(batch.labels[:, :-1][trained], batch.input_ids[:, 1:][trained])
    assert (batch.input_ids >= 600).any() and (batch.input_ids == 500).any()
    # span corruption trains from the second <extra_id_0> of a document on, and not the text before it
    for r in range(8):
        for context, targets in (batch.input_ids[r] == 600).nonzero().flatten().unfold(0, 2, 2).tolist():
            assert batch.labels[r, targets - 1] == 600 and not batch.loss_mask[r, context - 1 : targets - 1].any()
    again = [rows.batch([i]).input_ids for i in (5, 2)]
    assert torch.equal(torch.cat(again), batch.input_ids[[5, 2]])


def test_held_out_rows_come_once_whatever_the_seed(shards: str) -> None:
    rows = TextRows(shards, "held_out", T, seed=0, mask_documents=True)
    ids = rows.batch(range(len(rows))).input_ids
    assert len(ids.unique(dim=0)) == len(rows) > 3
    other = TextRows(shards, "held_out", T, seed=9, mask_documents=True)
    assert torch.equal(ids, other.batch(range(len(rows))).input_ids)


def test_held_out_rows_of_one_source(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": f"{name}{i} " * 9}) for i in range(40)))
    sources = [SourceConfig(name=n, type="jsonl", path=f"{tmp_path}/{n}.jsonl", held_out=0.5) for n in ("a", "b")]
    write_shards(sources, tokenizer, str(tmp_path), 0)
    rows = TextRows(str(tmp_path), "held_out", T, seed=0, mask_documents=False)
    for name, reader in open_shards(str(tmp_path), "held_out").items():
        own = rows.of_source(name)
        cut = [reader.tokens[i * T : (i + 1) * T].tolist() for i in range((len(reader.tokens) - 1) // T)]
        assert sorted(own.batch(range(len(own))).input_ids.tolist()) == sorted(cut) and len(cut) > 3
    assert len(rows) == sum(len(rows.of_source(name)) for name in ("a", "b"))  # and `rows` is as it was


def test_bytes_per_token_are_of_the_rows_that_are_measured(shards: str, tokenizer: Tokenizer) -> None:
    rows, readers, found = TextRows(shards, "held_out", T, 0, True), open_shards(shards, "held_out").values(), []
    for count in (1, 2, 10_000):
        batch = rows.batch(range(min(count, len(rows))))
        texts = [tokenizer.decode(row[mask].tolist()) for row, mask in zip(batch.labels, batch.loss_mask, strict=True)]
        found.append(rows.bytes_per_token(count, tokenizer.decode))
        assert found[-1] == len("".join(texts).encode()) / int(batch.loss_mask.sum())
    assert found[-1] == pytest.approx(sum(r.text_bytes for r in readers) / sum(len(r.tokens) for r in readers), rel=0.1)
    assert len(set(found)) > 1
    assert rows.bytes_per_token(1, lambda ids: "a\ufffd") == 2 / int(rows.batch([0]).loss_mask.sum())  # a cut character


def test_rows_that_cannot_be_are_refused(shards: str) -> None:
    with pytest.raises(ValueError, match=r"fewer than 9000 \+ 1 tokens, the longest row of train.seq_len"):
        TextRows(shards, "train", 9000, 0, True)
    with pytest.raises(ValueError, match=r"fewer than 9000 \+ 1 tokens, the longest row of train.seq_len"):
        TextRows(shards, "held_out", 9000, 0, True)
    with pytest.raises(ValueError, match=r"weights for \['a'\], but the shards hold \['a', 'b'\]"):
        TextRows(shards, "train", T, 0, True, {"a": 1.0})


def test_best_fit_fills_the_fullest_row() -> None:
    assert best_fit([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]
    assert best_fit([10, 1], 10) == [[0], [1]]


def demonstrations(tmp_path: Path, count: int = 40) -> tuple[str, list[dict]]:
    records = [{"prompt": f"{i} + {i} =", "completion": f" {'1' * (i % 7)} answer {2 * i}"} for i in range(count)]
    path = tmp_path / "sft.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    return str(path), records


@pytest.mark.parametrize("pack", [True, False])
def test_each_demonstration_is_trained_once_an_epoch(tokenizer: Tokenizer, tmp_path: Path, pack: bool) -> None:
    path, records = demonstrations(tmp_path)
    data = Demonstrations(path, tokenizer, 64, seed=0, pack=pack)
    batch = data.batch(range(len(data)))
    assert len(data) < 25 if pack else len(data) == 40
    found = []
    for r in range(len(data)):
        for segment in range(int(batch.segment_ids[r].max()) + 1):
            at = batch.segment_ids[r] == segment
            ids, labels, mask = batch.input_ids[r][at], batch.labels[r][at], batch.loss_mask[r][at]
            assert batch.positions[r][at].tolist() == list(range(len(ids)))
            assert torch.equal(mask, labels != IGNORE)
            assert torch.equal(labels[mask][:-1], ids[1:][mask[:-1]])
            assert labels[-1] == tokenizer.eos_id
            prompt = len(ids) + 1 - int(mask.sum())
            found.append((tokenizer.decode(ids[:prompt].tolist()), tokenizer.decode(labels[mask].tolist())))
    assert sorted(found) == sorted((r["prompt"], r["completion"]) for r in records)
    padding = batch.segment_ids == -1
    assert (batch.input_ids[padding] == tokenizer.pad_id).all()
    assert not batch.loss_mask[padding].any()


def test_epochs_differ_and_samples_repeat(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path, _ = demonstrations(tmp_path)
    data = Demonstrations(path, tokenizer, 64, seed=0)
    n = len(data)
    first, second = data.batch(range(n)).input_ids, data.batch(range(n, 2 * n)).input_ids
    assert not torch.equal(first, second)
    assert torch.equal(first[first[:, 0].argsort(stable=True)].sum(), second.sum())
    assert torch.equal(Demonstrations(path, tokenizer, 64, seed=0).batch([3]).input_ids, first[3:4])
    assert not torch.equal(Demonstrations(path, tokenizer, 64, seed=1).batch(range(n)).input_ids[0], first[0])


def rows_in_order(tokenizer: Tokenizer, path: Path, seed: int, pack: bool) -> str:
    """The rows of two epochs, each example as the letter of its prompt."""
    data = Demonstrations(str(path), tokenizer, 4, seed, pack)
    rows = (data.row(sample)["input_ids"][::2] for sample in range(2 * len(data)))
    return " ".join(tokenizer.decode(prompts) for prompts in rows)


def test_which_demonstrations_share_a_row_and_their_order_do_not_change(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A run that resumes needs the same rows from every later version. Each example has 2 tokens, a row has 4; the seed
    decides which two share a row, and the order of the rows in each epoch."""
    path = tmp_path / "sft.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": letter, "completion": "1"}) for letter in "abcdefghij"))
    assert rows_in_order(tokenizer, path, seed=0, pack=True) == "ca hf gi be jd hf be jd ca gi"
    assert rows_in_order(tokenizer, path, seed=1, pack=True) == "hf ab id gc je ab gc hf id je"
    assert rows_in_order(tokenizer, path, seed=0, pack=False) == "h f g e b j i a c d f j b e g i c a h d"
    assert rows_in_order(tokenizer, path, seed=1, pack=False) == "d a i e f b c j g h h d j c i b g e f a"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"sft.jsonl:2: not valid JSON"),
        ('{"prompt": "a"}', r"sft.jsonl:2: missing field 'completion' or 'answer'; found 'prompt'"),
        ('{"answer": "a"}', r"sft.jsonl:2: missing field 'prompt' or 'messages'"),
        ('{"prompt": "", "answer": "a"}', r"sft.jsonl:2: the prompt is empty"),
        ('{"prompt": "a", "answer": 3}', r"sft.jsonl:2: field 'answer' must be a string"),
        ('{"prompt": "a", "answer": "' + "7" * 64 + '"}', r"sft.jsonl:2: the example has 65 tokens, more than .*=64"),
    ],
)
def test_broken_lines(tokenizer: Tokenizer, tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "sft.jsonl").write_text('{"prompt": "a", "answer": "b"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        Demonstrations(str(tmp_path / "sft.jsonl"), tokenizer, 64, 0)


def test_missing_and_empty_files(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        Demonstrations(str(tmp_path / "sft.jsonl"), tokenizer, 64, 0)
    (tmp_path / "sft.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        Demonstrations(str(tmp_path / "sft.jsonl"), tokenizer, 64, 0)


def test_the_longest_example_that_fits(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "sft.jsonl").write_text('{"prompt": "a", "answer": "' + "7" * 63 + '"}')
    batch = Demonstrations(str(tmp_path / "sft.jsonl"), tokenizer, 64, 0).batch([0])
    assert batch.loss_mask.all()
    assert math.prod(batch.input_ids.shape) == 64


def whole_rows(shards: str, seq_len: int = 32, **more: object) -> TextRows:
    return TextRows(shards, "train", seq_len, 0, True, {"a": 3.0, "b": 1.0}, whole=True, **more)


def test_whole_documents_are_trained_once_an_epoch(shards: str, tokenizer: Tokenizer) -> None:
    """Each by itself from position 0; behind them is padding, which nobody trains."""
    rows = TextRows(shards, "train", 32, 0, True, {"a": 1.0, "b": 1.0}, whole=True)
    wanted = {}
    for name, reader in open_shards(shards, "train").items():
        spans = zip(reader.offsets[:-1], reader.offsets[1:], strict=True)
        wanted |= {tuple(reader.tokens[a:b].tolist()): name for a, b in spans}
    found = Counter()
    batch = rows.batch(range(1000))
    for r in range(1000):
        segments = batch.segment_ids[r]
        for segment in range(int(segments.max()) + 1):
            at = segments == segment
            assert batch.positions[r][at].tolist() == list(range(int(at.sum()))) and batch.loss_mask[r][at].all()
            ids, labels = batch.input_ids[r][at], batch.labels[r][at]
            assert torch.equal(ids[1:], labels[:-1])
            found[(*ids.tolist(), int(labels[-1]))] += 1
        padding = segments == -1
        assert (batch.labels[r][padding] == IGNORE).all() and (batch.input_ids[r][padding] == tokenizer.eos_id).all()
        assert not padding[: int((~padding).sum())].any()
    assert found.keys() == wanted.keys()  # none is longer than a row
    for name in ("a", "b"):
        times = [found[document] for document, owner in wanted.items() if owner == name]
        assert min(times) > 5 and max(times) - min(times) <= 1
    shares = rows.padding()
    assert set(shares) == {"a", "b"} and all(0 <= share < 0.1 for share in shares.values())


def test_long_documents_are_cut_into_pieces_that_go_on(shards: str) -> None:
    rows = whole_rows(shards, 8)
    batch = rows.batch(range(2000))
    assert not (batch.loss_mask & (batch.segment_ids < 0)).any() and batch.positions.max() == 7
    tokens = open_shards(shards, "train")["b"].tokens
    pairs = {(int(x), int(y)) for x, y in pairwise(tokens) if x != rows.eos_id}
    trained = batch.loss_mask
    seen = set(zip(batch.input_ids[trained].tolist(), batch.labels[trained].tolist(), strict=True))
    assert pairs <= seen and all(x != rows.eos_id for x, _ in seen)


def test_pieces_of_whole_rows_are_the_same_row(shards: str) -> None:
    whole = whole_rows(shards).batch(range(8))
    for seq_len in (8, 16):
        n = 32 // seq_len
        batch = whole_rows(shards).batch(range(8 * n), seq_len)
        for name in ("input_ids", "labels", "loss_mask"):
            assert torch.equal(getattr(batch, name).view(8, 32), getattr(whole, name))
        assert torch.equal(batch.segment_ids.view(8, 32) == -1, whole.segment_ids == -1)
        first = batch.positions[:, 0]
        assert not first.any()
        for r, (segments, positions) in enumerate(zip(batch.segment_ids, batch.positions, strict=True)):
            for segment in segments.unique().tolist():
                length = int((segments == segment).sum())
                assert segment == -1 or positions[segments == segment].tolist() == list(range(length)), r


def test_whole_documents_are_rearranged_each_by_itself(shards: str, tokenizer: Tokenizer) -> None:
    rearranged = Objectives(DataConfig(fim_share=1.0), (500, 501, 502), (), tokenizer.eos_id, seed=3)
    plain, batch = (
        whole_rows(shards, 64).batch(range(20)),
        whole_rows(shards, 64, objectives=rearranged).batch(range(20)),
    )
    assert torch.equal(batch.segment_ids, plain.segment_ids) and torch.equal(batch.positions, plain.positions)
    changed = 0
    for r in range(20):
        for segment in range(int(plain.segment_ids[r].max()) + 1):
            at = plain.segment_ids[r] == segment
            before, after = ([*b.input_ids[r][at].tolist(), int(b.labels[r][at][-1])] for b in (plain, batch))
            assert after[-1] == tokenizer.eos_id and len(before) == len(after)
            changed += after[0] == 500
            assert (after[0] == 500) == (len(before) >= 16)
            assert Counter(token for token in after if token < 500) <= Counter(before)
    assert changed > 10


def test_each_document_of_a_row_has_choices_of_its_own(shards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers: list[int] = []
    rearranged = Objectives(DataConfig(fim_share=1.0), (500, 501, 502), (), 1, seed=3)
    real = Objectives.apply
    monkeypatch.setattr(Objectives, "apply", lambda self, tokens, row: numbers.append(row) or real(self, tokens, row))
    whole_rows(shards, 64, objectives=rearranged).batch(range(20))
    assert len(numbers) == len(set(numbers)) > 40


def mixed_rows(directory: str, whole: bool) -> TextRows:
    mix = MixSettings({"a": 3.0, "b": 1.0}, {"b": 9.0}, anneal=((64, {"a": 1.0, "b": 4.0}),))
    return TextRows(directory, "train", T, 0, True, {"a": 3.0, "b": 1.0}, None, mix, whole)


@pytest.mark.parametrize("whole", [False, True])
def test_ranks_and_workers_do_not_change_the_rows(shards: str, whole: bool) -> None:
    """48 rows a step, taken by 1 to 8 ranks with 0 to 4 workers each, and by a run that changes both at each step."""
    expected = [mixed_rows(shards, whole).batch(range(48 * step, 48 * step + 48)) for step in range(3)]
    kinds = [(ranks, workers) for ranks in (1, 2, 3, 4, 6, 8) for workers in (0, 1, 2, 4)]
    changing = [[kinds[(7 * step + shift) % len(kinds)] for step in range(3)] for shift in range(4)]
    for steps in [*([kind] * 3 for kind in kinds), *changing]:
        for step, (ranks, workers) in enumerate(steps):
            parts = []
            for rank in range(ranks):
                rows = mixed_rows(shards, whole)
                with Ahead(lambda samples, rows=rows: rows.batch(samples), workers) as ahead:
                    starts = range(48 * step + 2 * rank, 48 * step + 48, 2 * ranks)
                    keys = [range(start, start + 2) for start in starts]
                    later = [range(key.start + 48, key.stop + 48) for key in keys]
                    parts += zip([key.start for key in keys], ahead.take(keys, later), strict=True)
            batches = [batch for _, batch in sorted(parts, key=lambda part: part[0])]
            for name in ("input_ids", "labels", "loss_mask", "positions", "segment_ids"):
                joined = torch.cat([getattr(batch, name) for batch in batches])
                assert torch.equal(joined, getattr(expected[step], name)), (steps, step, name)


def test_shares_so_far(shards: str) -> None:
    rows = mixed_rows(shards, False)
    assert rows.shares(64) == {"a": 0.75, "b": 0.25} and rows.shares(0) == {}
    names = [rows.locate(sample)[0] for sample in range(100)]
    assert rows.shares(100) == {name: names.count(name) / 100 for name in ("a", "b")}
