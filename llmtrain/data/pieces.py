"""Tokenizes a source piece by piece: a run that was killed goes on behind the last piece that is whole.

The tokens and the lengths of documents are appended to files; when a piece is on the disk, a line of the source's
journal says how far the files go and what their checksums are up to there. The bytes do not depend on where pieces end,
nor on how many processes tokenize.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import IO, Any

import numpy as np

from llmtrain.data.tokenizer import Tokenizer, load_tokenizer
from llmtrain.observe.files import sync

PIECE_BYTES = 64 * 2**20  # of UTF-8 text; so much is tokenized again after a kill
BATCH_BYTES, BATCH_DOCUMENTS = 2**19, 256  # tokenized together at most, but for a longer document
AHEAD = 3  # batches for each process that wait for it or for their turn
BLOCK_BYTES = 2**22

Document = tuple[str, str]  # split, text
Parts = dict[str, tuple[bytes, np.ndarray, int]]
"""Maps a split to the bytes of its token ids, the tokens of each document, and the UTF-8 bytes of their text."""
Encode = Callable[[Iterable[list[Document]]], Iterator[Parts]]


def encode(tokenizer: Tokenizer, dtype: str, batch: list[Document]) -> Parts:
    """Returns the tokens of a batch, every document between what belongs before a text and the end of text."""
    before, end = tokenizer.prefix_ids, [tokenizer.eos_id]
    all_ids = tokenizer.encode_batch([text for _, text in batch], parse_special=False)
    parts: Parts = {}
    for split in dict.fromkeys(split for split, _ in batch):
        chosen = [i for i, (each, _) in enumerate(batch) if each == split]
        ids = b"".join(np.array([*before, *all_ids[i], *end], dtype).tobytes() for i in chosen)
        lengths = np.array([len(before) + len(all_ids[i]) + 1 for i in chosen], np.int64)
        parts[split] = (ids, lengths, sum(len(batch[i][1].encode()) for i in chosen))
    return parts


@contextmanager
def encoder(tokenizer: Tokenizer, dtype: str, workers: int) -> Iterator[Encode]:
    """Yields a function that tokenizes batches, in their order: here with the threads of the tokenizers library, or
    with `workers` > 1 in so many processes. Raises RuntimeError when one of these ends."""
    if workers == 1:
        yield partial(map, partial(encode, tokenizer, dtype))
        return
    start = (tokenizer.directory, dtype)
    with ProcessPoolExecutor(workers, get_context("spawn"), _started, start) as pool:
        yield partial(_in_order, pool, workers * AHEAD)


def _started(directory: str, dtype: str) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    global _encode
    _encode = partial(encode, load_tokenizer(directory), dtype)


def _encode_there(batch: list[Document]) -> Parts:
    return _encode(batch)


def _in_order(pool: ProcessPoolExecutor, most: int, batches: Iterable[list[Document]]) -> Iterator[Parts]:
    waiting: deque[Future[Parts]] = deque()
    try:
        for batch in batches:
            waiting.append(pool.submit(_encode_there, batch))
            if len(waiting) == most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise RuntimeError(
            "a process that tokenizes has ended before its work, perhaps for lack of memory; lower data.workers and "
            "start again: what is tokenized stays"
        ) from None


def batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Yields the documents in lists of about BATCH_BYTES."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document[1])
        if size >= BATCH_BYTES or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@dataclass
class Grown:
    """Holds how far the files of a split go."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0  # of text
    sha256: Any = field(default_factory=hashlib.sha256)  # of the token ids so far
    lengths_sha256: Any = field(default_factory=hashlib.sha256)

    def summary(self) -> dict[str, Any]:
        """Returns what the journal says."""
        counts = {"documents": self.documents, "tokens": self.tokens, "bytes": self.bytes}
        return counts | {"sha256": self.sha256.hexdigest(), "lengths_sha256": self.lengths_sha256.hexdigest()}


class SourceFiles:
    """Holds the files of a source in `directory` while they grow. `key` says from what they are made: files of another
    key, or that are not what the journal says, begin anew."""

    def __init__(self, directory: str, name: str, splits: Iterable[str], itemsize: int, key: str) -> None:
        self.stem, self.itemsize, self.key = os.path.join(directory, name), itemsize, key
        self.grown = {split: Grown() for split in splits}
        self.documents, self.finished = 0, False
        self._go_on()

    def append(self, parts: Parts) -> None:
        """Writes tokens and lengths behind those that are there."""
        for split, (ids, lengths, text_bytes) in parts.items():
            grown, raw = self.grown[split], lengths.tobytes()
            self.files[f"{split}.bin"].write(ids)
            self.files[f"{split}.lengths"].write(raw)
            grown.sha256.update(ids)
            grown.lengths_sha256.update(raw)
            grown.documents, grown.tokens = grown.documents + len(lengths), grown.tokens + int(lengths.sum())
            grown.bytes += text_bytes
            self.documents += len(lengths)

    @property
    def text_bytes(self) -> int:
        """Returns the UTF-8 bytes of all text so far."""
        return sum(grown.bytes for grown in self.grown.values())

    def end_piece(self, finished: bool = False) -> None:
        """Notes what is written as a whole piece, when it is on the disk."""
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        splits = {split: grown.summary() for split, grown in self.grown.items()}
        line = {"key": self.key, "documents": self.documents, "finished": finished, "splits": splits}
        with open(f"{self.stem}.pieces.jsonl", "a", encoding="utf-8") as journal:
            journal.write(json.dumps(line) + "\n")
            journal.flush()
            os.fsync(journal.fileno())
        sync(os.path.dirname(self.stem))
        self.finished = finished

    def close(self) -> None:
        """Closes the files."""
        for file in self.files.values():
            file.close()

    def lengths(self, split: str) -> np.ndarray:
        """Returns the tokens of each document of a split."""
        return np.fromfile(f"{self.stem}-{split}.lengths", np.int64)

    def _go_on(self) -> None:
        lines = [line for line in journal_lines(f"{self.stem}.pieces.jsonl") if line.get("key") == self.key]
        intact = lines[: min((self._intact(split, lines) for split in self.grown), default=0)]
        last = intact[-1] if intact else None
        self.documents, self.finished = (last["documents"], last["finished"]) if last else (0, False)
        self.files: dict[str, IO[bytes]] = {}
        for split in self.grown:
            self._restore(split, last["splits"][split] if last else None)
        if not intact:  # by other names: files may have a second one, in the data directory
            Path(f"{self.stem}.pieces.jsonl").unlink(missing_ok=True)
        if self.finished:
            return
        if len(intact) < len(lines):
            text = "".join(json.dumps(line) + "\n" for line in intact)
            Path(f"{self.stem}.pieces.jsonl").write_text(text, encoding="utf-8")
        for split in self.grown:
            for end in ("bin", "lengths"):
                file = open(f"{self.stem}-{split}.{end}", "ab")  # noqa: SIM115  closed by `close`
                self.files[f"{split}.{end}"] = file

    def _intact(self, split: str, lines: list[dict[str, Any]]) -> int:
        """Returns how many pieces of the journal are on the disk as it says."""
        path, counts = f"{self.stem}-{split}", [line["splits"][split] for line in lines]
        tokens = matching(f"{path}.bin", [(c["tokens"] * self.itemsize, c["sha256"]) for c in counts])
        return min(tokens, matching(f"{path}.lengths", [(c["documents"] * 8, c["lengths_sha256"]) for c in counts]))

    def _restore(self, split: str, counts: dict[str, Any] | None) -> None:
        """Takes up a split as it was at the end of a piece; what is behind it in the files is removed."""
        path, grown = f"{self.stem}-{split}", self.grown[split]
        if counts is None:
            for end in ("bin", "lengths"):
                Path(f"{path}.{end}").unlink(missing_ok=True)
            return
        grown.documents, grown.tokens, grown.bytes = counts["documents"], counts["tokens"], counts["bytes"]
        sizes = {"bin": counts["tokens"] * self.itemsize, "lengths": counts["documents"] * 8}
        if not self.finished:
            for end, size in sizes.items():
                os.truncate(f"{path}.{end}", size)
        grown.sha256 = digest_of(f"{path}.bin", sizes["bin"])
        grown.lengths_sha256 = digest_of(f"{path}.lengths", sizes["lengths"])


def journal_lines(path: str) -> list[dict[str, Any]]:
    """Returns the lines of a journal up to the first that is not whole."""
    lines: list[dict[str, Any]] = []
    with suppress(OSError, ValueError), open(path, encoding="utf-8") as file:
        lines.extend(json.loads(line) for line in file)
    return lines


def matching(path: str, expected: list[tuple[int, str]]) -> int:
    """Returns how many of the (bytes, sha256), with rising numbers of bytes, are those of the beginning of a file, up
    to the first that is not."""
    if not os.path.isfile(path):
        return 0
    digest, at = hashlib.sha256(), 0
    with open(path, "rb") as file:
        for number, (size, sha256) in enumerate(expected):
            at += feed(digest, file, size - at)
            if at != size or digest.copy().hexdigest() != sha256:
                return number
    return len(expected)


def digest_of(path: str, size: int) -> Any:
    """Returns the sha256 of the first bytes of a file, to go on with."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        feed(digest, file, size)
    return digest


def feed(digest: Any, file: IO[bytes], size: int) -> int:
    """Reads so many bytes into a digest, or as many as there are; returns how many."""
    left = size
    while left and (block := file.read(min(left, BLOCK_BYTES))):
        digest.update(block)
        left -= len(block)
    return size - left


def write_pieces(
    files: SourceFiles, documents: Iterator[Document], encode_all: Encode, progress: Callable[[int], None]
) -> None:
    """Tokenizes the documents that are not yet in the files, which are closed at the end. `progress` is called with the
    number of UTF-8 bytes done."""
    try:
        if files.finished:
            return
        noted = files.text_bytes
        for parts in encode_all(batches(islice(documents, files.documents, None))):
            files.append(parts)
            progress(files.text_bytes)
            if files.text_bytes - noted >= PIECE_BYTES:
                files.end_piece()
                noted = files.text_bytes
        files.end_piece(finished=True)
    finally:
        files.close()
