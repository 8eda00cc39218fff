"""Measures how fast rows of tokens are loaded, and text is tokenized, beside the usual libraries, in CPU time.

Contestants take turns in one process with one thread, on the same file of tokens or text; the medians of the rounds
are written. Megatron takes part where `megatron-core` is installed; it is left out, and named as not run, elsewhere.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks.common import cpu_s, environment
from llmtrain.config.schema import SourceConfig, TokenizerConfig
from llmtrain.data.collect import documents
from llmtrain.data.megatron import index
from llmtrain.data.packing import TextRows
from llmtrain.data.shards import SPLITS, write_shards
from llmtrain.data.tokenizer import Tokenizer, load_tokenizer
from llmtrain.data.tokenizer_train import train_tokenizer

EOS, DOCUMENT_TOKENS = 1, 700  # the mean of documents, whose lengths are log-normal
PACKAGES = ("numpy", "torch", "tokenizers", "datasets", "datatrove", "transformers")
Piece = Callable[[], int]
"""Does a piece of work and returns its size."""


def write_tokens(directory: str, tokens: int) -> None:
    """Writes shards of one source with random tokens."""
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(np.log(DOCUMENT_TOKENS) - 0.5, 1.0, 2 * tokens // DOCUMENT_TOKENS)).astype(np.int64) + 2
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    offsets = offsets[: np.searchsorted(offsets, tokens)]
    ids = rng.integers(2, 50_000, offsets[-1], dtype=np.uint16)
    ids[offsets[1:] - 1] = EOS
    counts = {"documents": len(offsets) - 1, "tokens": len(ids), "bytes": 4 * len(ids)}
    for split, kept in zip(SPLITS, (ids, ids[:0]), strict=True):
        kept.tofile(os.path.join(directory, f"s-{split}.bin"))
        np.save(os.path.join(directory, f"s-{split}.offsets.npy"), offsets if len(kept) else offsets[:1])
    splits = dict(zip(SPLITS, (counts, dict.fromkeys(counts, 0)), strict=True))
    manifest = {"tokenizer": "", "eos_id": EOS, "dtype": "uint16", "sources": {"s": splits}}
    Path(directory, "shards.json").write_text(json.dumps(manifest))


def ours(directory: str, seq_len: int, rows: int, mask: bool, whole: bool = False) -> Piece:
    """Returns what loads a batch with our rows, in random order: ids, labels, positions, and with `mask` segments."""
    text = TextRows(directory, "train", seq_len, 0, mask, whole=whole)
    numbers = count()
    return lambda: text.batch(range((first := next(numbers) * rows), first + rows)).input_ids.numel()


def ours_tokens(directory: str, seq_len: int, rows: int) -> Piece:
    """Returns what loads the tokens of a batch alone, as the others do."""
    text = TextRows(directory, "train", seq_len, 0, False)
    numbers = count()

    def load() -> int:
        first = next(numbers) * rows
        return torch.from_numpy(text.tokens(range(first, first + rows)))[:, :-1].numel()

    return load


def datatrove(directory: str, seq_len: int, rows: int, positions: bool) -> Piece:
    """Returns what loads a batch with datatrove's DatatroveFolderDataset, shuffled, and stacks it; with `positions`
    those that restart at the end of text."""
    from datatrove.utils.dataset import DatatroveFolderDataset

    more = {"positions_from_eos_token_id": EOS, "return_positions": True} if positions else {}
    data = DatatroveFolderDataset(directory, seq_len, filename_pattern="s-train.bin", shuffle=True, seed=0, **more)
    order, numbers = np.random.default_rng(0).permutation(len(data)), count()

    def load() -> int:
        first = next(numbers) * rows
        items = [data[int(order[(first + i) % len(order)])] for i in range(rows)]
        stacked = {name: torch.stack([item[name] for item in items]) for name in items[0]}
        return stacked["input_ids"][:, :-1].numel()

    return load


def gpt_dataset(directory: str, seq_len: int, rows: int) -> Piece:
    """Returns what loads a batch with Megatron's GPTDataset and stacks it: tokens, labels, loss masks and positions,
    which do not restart at documents."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    stem = os.path.join(directory, "gpt")
    os.link(os.path.join(directory, "s-train.bin"), f"{stem}.bin")
    Path(f"{stem}.idx").write_bytes(index(np.load(os.path.join(directory, "s-train.offsets.npy")), "uint16"))
    indexed, size = IndexedDataset(stem), os.path.getsize(f"{stem}.bin") // 2
    off = dict.fromkeys(("reset_position_ids", "reset_attention_mask", "eod_mask_loss", "create_attention_mask"), False)
    tokenizer = SimpleNamespace(eod=EOS, pad=0, vocab_size=50_000, unique_identifiers={})
    settings = {"split": "1", "tokenizer": tokenizer, "path_to_cache": directory}
    config = GPTDatasetConfig(0, seq_len, blend=([stem], None), **settings, **off)
    every = np.arange(len(indexed.sequence_lengths), dtype=np.int32)
    data, numbers = GPTDataset(indexed, stem, every, size // seq_len - 1, Split.train, config), count()

    def load() -> int:
        first = next(numbers) * rows
        items = [data[(first + i) % len(data)] for i in range(rows)]
        return {name: torch.stack([item[name] for item in items]) for name in items[0]}["tokens"].numel()

    return load


def megatron(directory: str, seq_len: int, rows: int) -> Piece:
    """Returns what reads a batch of contiguous rows anywhere in the file, in random order, by IndexedDataset.get, and
    stacks them: tokens alone. What Megatron's GPTDataset does on top (labels, masks, positions) is left out."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    stem, size = os.path.join(directory, "megatron"), os.path.getsize(os.path.join(directory, "s-train.bin")) // 2
    os.link(os.path.join(directory, "s-train.bin"), f"{stem}.bin")
    Path(f"{stem}.idx").write_bytes(index(np.array([0, size]), "uint16"))
    data, places = IndexedDataset(stem), (size - 1) // seq_len
    order, numbers = np.random.default_rng(0).permutation(places), count()

    def load() -> int:
        first = next(numbers) * rows
        items = [data.get(0, int(order[(first + i) % places]) * seq_len, seq_len + 1) for i in range(rows)]
        return torch.from_numpy(np.stack(items).astype(np.int64))[:, :-1].numel()

    return load


def loader_case(
    tokens: int = 64_000_000, seq_len: int = 2048, rows: int = 16, batches: int = 200, rounds: int = 7
) -> dict[str, Any]:
    """Returns tokens a CPU-second of each loader, by its name; None for one that is not installed."""
    with tempfile.TemporaryDirectory() as directory:
        write_tokens(directory, tokens)
        args = (directory, seq_len, rows)
        contestants = {
            "ours, tokens": ours_tokens(*args),
            "ours": ours(*args, mask=False),
            "ours, document masks": ours(*args, mask=True),
            "ours, best fit": ours(*args, mask=True, whole=True),
            "datatrove, tokens": datatrove(*args, positions=False),
            "datatrove, positions": datatrove(*args, positions=True),
            "megatron, tokens": megatron(*args) if find_spec("megatron") else None,
            "megatron, GPTDataset": gpt_dataset(*args) if find_spec("megatron") else None,
        }
        return {
            "tokens": tokens,
            "seq_len": seq_len,
            "rows": rows,
            "tokens_per_cpu_s": race(contestants, batches, rounds),
        }


def tokenize_case(text_bytes: int = 8_000_000, rounds: int = 5) -> dict[str, Any]:
    """Returns bytes of text a CPU-second that are read from JSONL, tokenized and written, by ours and by
    `datasets.map`."""
    with tempfile.TemporaryDirectory() as directory:
        texts = list(documents(SourceConfig(name="stdlib", type="stdlib", max_bytes=text_bytes), 0))
        path = os.path.join(directory, "text.jsonl")
        Path(path).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        train_tokenizer(texts[:200], os.path.join(directory, "tokenizer"), TokenizerConfig(vocab_size=8192))
        tokenizer, size = load_tokenizer(os.path.join(directory, "tokenizer")), sum(len(t.encode()) for t in texts)
        contestants = {"ours": shards(path, tokenizer, directory, size), "datasets": mapped(path, tokenizer, size)}
        return {"text_bytes": size, "documents": len(texts), "bytes_per_cpu_s": race(contestants, 1, rounds)}


def shards(path: str, tokenizer: Tokenizer, directory: str, size: int) -> Piece:
    """Returns what writes shards of the file."""
    numbers = count()
    source = SourceConfig(name="s", type="jsonl", path=path, held_out=0.0)
    return lambda: write_shards([source], tokenizer, f"{directory}/shards{next(numbers)}", 0) or size


def mapped(path: str, tokenizer: Tokenizer, size: int) -> Piece:
    """Returns what tokenizes the file with `datasets.map(batched=True, num_proc=1)` and the same tokenizer."""
    import datasets

    datasets.disable_progress_bars()
    theirs = tokenizer.hugging_face

    def tokenize(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"input_ids": theirs(batch["text"], return_attention_mask=False)["input_ids"]}

    def work() -> int:
        with tempfile.TemporaryDirectory() as cache:
            data = datasets.load_dataset("json", data_files=path, split="train", cache_dir=cache)
            data.map(tokenize, batched=True, num_proc=1, remove_columns=["text"])
        return size

    return work


def race(contestants: dict[str, Piece | None], pieces: int, rounds: int) -> dict[str, float | None]:
    """Returns the median over rounds of what each gets done a CPU-second; they take turns, and the first round does not
    count."""
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds + 1):
        for name, work in contestants.items():
            if work is not None:
                began = cpu_s()
                done = sum(work() for _ in range(pieces))
                rates[name].append(done / (cpu_s() - began))
    return {name: median(found[1:]) if found else None for name, found in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_loader", description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=64_000_000)
    parser.add_argument("--text-bytes", type=int, default=8_000_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", help="JSON file to write")
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    began = time.perf_counter()
    found = {
        "loader": loader_case(args.tokens, rounds=args.rounds),
        "tokenize": tokenize_case(args.text_bytes, args.rounds),
    }
    packages = (*PACKAGES, "megatron-core") if find_spec("megatron") else PACKAGES
    text = json.dumps({**environment("benchmarks.data_loader", packages, 1), **found}, indent=2)
    print(f"{text}\n{time.perf_counter() - began:.0f} s")
    if args.out:
        Path(args.out).write_text(text + "\n")


if __name__ == "__main__":
    main()
