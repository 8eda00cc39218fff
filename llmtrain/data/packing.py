"""Builds rows of tokens for training: contiguous text, or demonstrations packed several to a row."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch

from llmtrain.config.schema import DataConfig
from llmtrain.data.encode import Encoded, encode_rows
from llmtrain.data.faults import Faults
from llmtrain.data.mix import Blocks, Mix, MixSettings
from llmtrain.data.objectives import Objectives
from llmtrain.data.prompts import AS_IT_IS
from llmtrain.data.room import Room
from llmtrain.data.rows import Record
from llmtrain.data.sampler import derive, permuted, permuted_all
from llmtrain.data.shards import open_shards
from llmtrain.data.tokenizer import Tokenizer
from llmtrain.data.whole import plan_rows, row_of
from llmtrain.types import IGNORE, Batch

Row = dict[str, list]
"""A row before padding has the columns input_ids, labels, positions, segment_ids; where samples share tokens branch_ids
and ends; any other column becomes one of `Batch.extra`."""

Columns = Callable[[Record], dict[str, float]]
"""Maps a row of a file to numbers, by their names in `Batch.extra`. Raises ValueError, without a place, for a row that
it cannot read."""

Choose = Callable[[list[Encoded]], list[Encoded]]
"""Returns which rows of a file are trained, in their order, before any is left out or cut for its length. Raises
ValueError when none is."""

LOCATED, KEPT_BLOCKS = 1024, 8  # samples that are located together, and how many such blocks are remembered
PADDING = {"labels": IGNORE, "segment_ids": -1}  # other columns: 0


def to_batch(rows: Sequence[Row], width_tokens: int, pad_id: int) -> Batch:
    """Pads rows to one width and stacks them. Positions with a label are trained."""
    padding = PADDING | {"input_ids": pad_id, "ends": width_tokens}
    columns = {
        name: torch.tensor([row[name] + [padding.get(name, 0)] * (width_tokens - len(row[name])) for row in rows])
        for name in rows[0]
    }
    known = {name: columns.pop(name) for name in tuple(columns) if name in Batch.__dataclass_fields__}
    extra = {name: column.float() for name, column in columns.items()}
    return Batch(**known, loss_mask=known["labels"] != IGNORE, extra=extra)


def concatenate(rows: Sequence[Row]) -> Row:
    """Returns several rows joined into one."""
    return {name: [x for row in rows for x in row[name]] for name in rows[0]}


def side_by_side(rows: Sequence[Row]) -> Row:
    """Returns rows joined into one, in which the segments of each are told apart from those of the others; {} if there
    are none."""
    if not rows:
        return {}
    first, place, shifted = 0, 0, []
    for row in rows:
        ends = {"ends": [place + end for end in row["ends"]]} if "ends" in row else {}
        shifted.append(row | ends | {"segment_ids": [first + segment for segment in row["segment_ids"]]})
        first, place = first + 1 + max(row["segment_ids"]), place + len(row["input_ids"])
    return concatenate(shifted)


def best_fit(lengths: Sequence[int], width_tokens: int) -> list[list[int]]:
    """Puts items, in the given order, each into the fullest row that still has room. Returns the items of each row."""
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(width_tokens + 1)]  # rows, indexed by their number of free tokens
    for item, length in enumerate(lengths):
        free = next((free for free in range(length, width_tokens + 1) if with_room[free]), None)
        row = len(rows) if free is None else with_room[free].pop()
        if free is None:
            rows.append([])
        rows[row].append(item)
        with_room[(width_tokens if free is None else free) - length].append(row)
    return rows


class TextRows:
    """Makes rows of `seq_len` tokens of pretraining text: contiguous ones, each with the token that follows, or with
    `whole` documents packed into rows by best fit.

    Training: sample numbers have no end; sources are mixed by `weights` (by name; None = by size) or as `mix` says,
    each in a new order in each of its epochs. Held out: samples 0..len-1 are the rows in one fixed order for every
    seed. With `mask_documents` attention and positions restart at documents, and the first token of a document is not
    predicted from the document before; `whole` always does. `objectives` rearranges documents. Raises ValueError when a
    source is too short for one row, the weights do not name the sources, or their rows do not suffice.
    """

    def __init__(
        self,
        directory: str,
        split: str,
        seq_len: int,
        seed: int,
        mask_documents: bool,
        weights: dict[str, float] | None = None,
        objectives: Objectives | None = None,
        mix: MixSettings | None = None,
        whole: bool = False,
    ) -> None:
        self.objectives = objectives
        self.seq_len, self.seed, self.mask_documents = seq_len, seed, mask_documents
        self.shuffled = split == "train"
        self.readers = open_shards(directory, split)
        self.flat = {name: reader.tokens.view(np.ndarray) for name, reader in self.readers.items()}  # cut faster
        self.plans = {n: plan_rows(r.offsets, seq_len, directory) for n, r in self.readers.items()} if whole else {}
        self.rows = {name: max(0, len(r.tokens) - 1) // seq_len for name, r in self.readers.items()}
        self.rows |= {name: len(plan) for name, plan in self.plans.items()}
        self.weights = dict(self.rows if weights is None else weights)
        where = f"{directory}, split {split}"
        short = [name for name, rows in self.rows.items() if rows == 0]
        if short if self.shuffled else not any(self.rows.values()):
            raise ValueError(
                f"{where}: {', '.join(short) or 'no source'} has fewer than {seq_len} + 1 tokens, the longest "
                "row of train.seq_len and train.seq_ramp; shorten the rows, give more text, or hold out another share"
            )
        if self.shuffled and self.weights.keys() != self.rows.keys():
            raise ValueError(f"{where}: weights for {sorted(self.weights)}, but the shards hold {sorted(self.rows)}")
        self.mix = None if not self.shuffled else self._mixed(mix)
        self._located = lru_cache(KEPT_BLOCKS)(self._locate_block)

    def _mixed(self, settings: MixSettings | None) -> Mix | Blocks:
        if settings is not None:
            return Mix(self.rows, settings, {name: len(reader.tokens) for name, reader in self.readers.items()})
        return Blocks({name: self.weights[name] for name in self.rows}, derive(self.seed, "sources"))

    def __len__(self) -> int:
        """Returns the number of rows in all sources: an epoch."""
        return sum(self.rows.values())

    def bytes_per_token(self, count: int, decode: Callable[[list[int]], str]) -> float:
        """Returns the mean UTF-8 bytes of text per token that the first `count` rows predict, as `decode` spells them:
        bits/byte = loss / ln 2 / bytes_per_token. Tokens without text, as ends of documents, have no bytes, and a
        character that the edge of a row cuts counts as one."""
        batch = self.batch(range(min(count, len(self))))
        predicted = [row[mask].tolist() for row, mask in zip(batch.labels, batch.loss_mask, strict=True)]
        texts = [decode(ids).replace("\ufffd", "?") for ids in predicted]
        return sum(len(text.encode()) for text in texts) / max(1, sum(map(len, predicted)))

    def of_source(self, name: str) -> TextRows:
        """Returns the held-out rows of one source alone, in one fixed order."""
        assert self.mix is None, "training rows are mixed"
        own = copy.copy(self)
        own.rows, own.readers = {name: self.rows[name]}, {name: self.readers[name]}
        return own

    def padding(self) -> dict[str, float]:
        """Returns the share of padding in the rows of each source; {} where rows are full."""
        return {name: plan.padding(self.seq_len) for name, plan in self.plans.items()}

    def shares(self, samples: int) -> dict[str, float]:
        """Returns which share of the first `samples` training samples came from each source."""
        if self.mix is None or not samples:
            return {}
        return {n: count / samples for n, count in zip(self.mix.names, self.mix.counts(samples), strict=True)}

    def locate(self, sample: int) -> tuple[str, int]:
        """Returns (source, row in it) of a sample."""
        if self.mix is not None:
            if self.mix.end is not None and sample >= self.mix.end:
                self.mix.source_of(sample)  # which says so
            sources, rows = self._located(sample // LOCATED)
            return self.mix.names[sources[sample % LOCATED]], rows[sample % LOCATED]
        row = permuted(sample, len(self), 0)
        for name, rows in self.rows.items():
            if row < rows:
                return name, row
            row -= rows
        raise AssertionError("row lies in one of the sources")

    def _locate_block(self, block: int) -> tuple[list[int], list[int]]:
        """Returns (sources, rows in them) of LOCATED samples, of which one by one costs more than its tokens do."""
        samples = np.arange(block * LOCATED, (block + 1) * LOCATED)
        sources, ordinals = self.mix.sources_of(samples[: None if self.mix.end is None else self.mix.end - samples[0]])
        rows = np.empty(len(sources), np.int64)
        for source in np.unique(sources).tolist():
            name, chosen = self.mix.names[source], sources == source
            rows[chosen] = permuted_all(ordinals[chosen], self.rows[name], derive(self.seed, name))
        return sources.tolist(), rows.tolist()

    def tokens(self, samples: Sequence[int], seq_len: int | None = None) -> np.ndarray:
        """Returns contiguous tokens of samples as they stand in the shards, each row with the token that follows,
        [len(samples), seq_len + 1] int64."""
        seq_len = seq_len or self.seq_len
        tokens = np.empty((len(samples), seq_len + 1), np.int64)
        for at, sample in enumerate(samples):
            base, offset = divmod(sample * seq_len, self.seq_len)
            name, row = self.locate(base)
            start = row * self.seq_len + offset
            tokens[at] = self.flat[name][start : start + seq_len + 1]
        return tokens

    def batch(self, samples: Sequence[int], seq_len: int | None = None) -> Batch:
        """Returns the rows of these sample numbers, [len(samples), seq_len].

        A `seq_len` that divides the rows' own splits each row into equal pieces, and sample numbers count those: sample
        i always begins with token i * seq_len of the run, whatever the length of the samples before.
        """
        seq_len = seq_len or self.seq_len
        if self.plans:
            return self._whole_documents(samples, seq_len)
        tokens = self.tokens(samples, seq_len)
        trained = None
        if self.objectives is not None:
            changed = [self.objectives.apply(row, s * seq_len) for row, s in zip(tokens, samples, strict=True)]
            tokens, trained = (np.stack(part) for part in zip(*changed, strict=True))
        ids, labels = tokens[:, :-1].copy(), tokens[:, 1:].copy()
        mask = np.ones(ids.shape, bool) if trained is None else trained[:, 1:].copy()
        positions, segments = np.tile(np.arange(seq_len), (len(ids), 1)), None
        if self.mask_documents:
            ends = np.flatnonzero(ids == self.eos_id)
            mask.reshape(-1)[ends] = False
            positions, segments = restarted(ends, *ids.shape)
        if not mask.all():
            labels[~mask] = IGNORE
        parts = (ids, labels, mask, positions, *(() if segments is None else (segments,)))
        return Batch(*map(torch.from_numpy, parts))

    def _whole_documents(self, samples: Sequence[int], seq_len: int) -> Batch:
        """Returns rows of packed documents. What is behind them is padding, a segment of its own that no one trains."""
        rows = {"input_ids": self.eos_id, "labels": IGNORE, "positions": 0, "segment_ids": -1}
        columns = {name: np.full((len(samples), seq_len), fill, np.int64) for name, fill in rows.items()}
        for at, sample in enumerate(samples):
            base, offset = divmod(sample * seq_len, self.seq_len)
            for name, values in zip(columns, self._packed(base, offset, seq_len), strict=True):
                columns[name][at, : len(values)] = values
        batch = {name: torch.from_numpy(values) for name, values in columns.items()}
        return Batch(**batch, loss_mask=batch["labels"] != IGNORE)

    def _packed(self, base: int, offset: int, seq_len: int) -> tuple[np.ndarray, ...]:
        """Returns (tokens, labels, positions, segments) of a part of a packed row; positions of a document that the
        part begins within start there."""
        name, row = self.locate(base)
        ids, labels, positions, segments = row_of(self.plans[name], row, self.flat[name])
        if self.objectives is not None:
            ids, labels = self._rearranged(ids, labels, segments, base)
        part = slice(offset, offset + seq_len)
        ids, labels, positions, segments = ids[part], labels[part], positions[part], segments[part]
        first = np.where(segments == segments[:1], positions[:1], 0) if len(segments) else positions
        return ids, labels, positions - first, segments - segments[:1]

    def _rearranged(
        self, ids: np.ndarray, labels: np.ndarray, segments: np.ndarray, base: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the row with its pieces rearranged, each by itself."""
        ids, labels = ids.astype(np.int64), labels.astype(np.int64)
        for piece, (start, end) in enumerate(runs(segments)):
            tokens = np.append(ids[start:end], labels[end - 1])
            tokens, trained = self.objectives.apply(tokens, base * self.seq_len + piece)
            ids[start:end], labels[start:end] = tokens[:-1], np.where(trained[1:], tokens[1:], IGNORE)
        return ids, labels

    @property
    def eos_id(self) -> int:
        """Returns the id of the end of text."""
        return next(iter(self.readers.values())).eos_id


def restarted(ends: np.ndarray, rows: int, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (positions, segments) of rows in which both go on anew behind `ends`, places in the rows laid one behind
    the other. Segments count from 0 in each row."""
    firsts = np.arange(rows) * seq_len
    starts = np.union1d(firsts, ends[ends < rows * seq_len - 1] + 1)
    lengths = np.diff(starts, append=rows * seq_len)
    positions = np.arange(rows * seq_len) - np.repeat(starts, lengths)
    number = np.arange(len(starts))
    number -= np.searchsorted(starts, firsts)[starts // seq_len]
    return positions.reshape(rows, seq_len), np.repeat(number, lengths).reshape(rows, seq_len)


def runs(segments: np.ndarray) -> list[tuple[int, int]]:
    """Returns [start, end) of each run of equal numbers."""
    ends = [*(np.flatnonzero(np.diff(segments)) + 1).tolist(), len(segments)]
    return list(zip([0, *ends[:-1]], ends, strict=True))


class Demonstrations:
    """Makes rows of prompts with their answers; the loss is on the answers and the tokens that end them.

    With `pack`, several examples share a row, each its own segment; the seed decides which. The rows come in a new
    order in each epoch. `settings` says how rows are read, which turns are trained, and what becomes of an example that
    is longer than a row; `columns` gives numbers for `Batch.extra`, each for all tokens of an example; `choose` says
    which rows are trained at all. Raises ValueError with all faults of the file, each with its line.
    """

    def __init__(
        self,
        path: str,
        tokenizer: Tokenizer,
        seq_len: int,
        seed: int,
        pack: bool = True,
        settings: DataConfig = AS_IT_IS,
        columns: Columns | None = None,
        choose: Choose | None = None,
    ) -> None:
        self.seq_len, self.pad_id, self.seed = seq_len, tokenizer.pad_id, derive(seed, "rows")
        self.examples = read_demonstrations(path, tokenizer, seq_len, settings, columns, choose)
        order = [permuted(i, len(self.examples), derive(seed, "packing")) for i in range(len(self.examples))]
        lengths = [len(self.examples[i]["labels"]) for i in order]
        plan = best_fit(lengths, seq_len) if pack else [[i] for i in range(len(order))]
        self.plan = [[order[i] for i in row] for row in plan]

    def __len__(self) -> int:
        """Returns the number of rows in an epoch."""
        return len(self.plan)

    def members(self, sample: int) -> list[Row]:
        """Returns the examples of a sample."""
        return [self.examples[i] for i in self.plan[permuted(sample, len(self), self.seed)]]

    def lengths(self, sample: int) -> list[int]:
        """Returns the tokens of each example of a sample."""
        return [len(member["labels"]) for member in self.members(sample)]

    def row(self, sample: int) -> Row:
        """Returns the columns of a sample, not padded."""
        return side_by_side([m | {"segment_ids": [0] * len(m["labels"])} for m in self.members(sample)])

    def batch(self, samples: Sequence[int], width_tokens: int | None = None) -> Batch:
        """Returns the rows of these sample numbers, [len(samples), width_tokens or else seq_len]."""
        return self.rows([[sample] for sample in samples], width_tokens or self.seq_len)

    def rows(self, samples: Sequence[Sequence[int]], width_tokens: int) -> Batch:
        """Returns rows of several samples each, [len(samples), width_tokens]."""
        empty: Row = {name: [] for name in (*self.examples[0], "segment_ids")}
        joined = [side_by_side([self.row(sample) for sample in row]) or empty for row in samples]
        return to_batch(joined, width_tokens, self.pad_id)


def read_demonstrations(
    path: str,
    tokenizer: Tokenizer,
    seq_len: int,
    settings: DataConfig,
    columns: Columns | None = None,
    choose: Choose | None = None,
) -> list[Row]:
    """Returns the examples of a file, without segment ids. Raises ValueError with all faults of the file."""
    faults = Faults(path)
    room = Room(seq_len, f"train.seq_len={seq_len}", settings.overlong, faults)
    encoded = encode_rows(path, tokenizer, settings, faults, answered=True)
    if choose is not None:
        found = list(encoded)
        faults.raise_any()  # it may take long, and needs all rows
        encoded = iter(choose(found))
    rows = map(room.demonstration, encoded)
    examples = [with_columns(row, columns, faults) for row in rows if row is not None]
    faults.raise_any()
    room.report(path, len(examples))
    return examples


def with_columns(row: Encoded, columns: Columns | None, faults: Faults) -> Row:
    """Returns the columns of one example, with those of its record; a record that they refuse goes to `faults`."""
    example = example_row(row.ids, row.trained)
    try:
        more = {} if columns is None else columns(row.example.record)
    except ValueError as error:
        faults.add(row.where, str(error))
        return example
    return example | {name: [value] * len(example["labels"]) for name, value in more.items()}


def example_row(ids: Sequence[int], trained: Sequence[bool]) -> Row:
    """Returns the columns of one example: each label is the token that follows, where that is trained."""
    labels = [token if chosen else IGNORE for token, chosen in zip(ids[1:], trained[1:], strict=True)]
    return {"input_ids": list(ids[:-1]), "labels": labels, "positions": list(range(len(labels)))}
