"""Measures deduplication on planted near duplicates of real text: recall by similarity beside the curve, precision, and
speed and memory as documents grow.

Passages of the standard library's documentation (pydoc's topics, then docstrings) are copied with words swapped or left
out at several rates and with text before and behind; brute force counts common shingles of all pairs.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import sysconfig
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from copy import deepcopy
from itertools import chain, combinations, pairwise
from multiprocessing import get_context
from pathlib import Path
from pydoc_data.topics import topics

from datatrove.data import Document
from datatrove.pipeline.dedup.minhash import MinhashConfig as DatatroveConfig
from datatrove.pipeline.dedup.minhash import MinhashDedupSignature
from datatrove.utils.hashing import HashConfig

from benchmarks.common import environment, forget_peak, peak_bytes
from llmtrain.config.clean.collect import CollectConfig
from llmtrain.config.clean.dedup import DedupConfig, MinhashConfig, ParagraphConfig
from llmtrain.data.clean.dedup.curve import Measured, draw_curve, probability
from llmtrain.data.clean.dedup.hashing import Bands, words
from llmtrain.data.clean.dedup.phases import dedup_phases
from llmtrain.data.clean.files import RankWriter
from llmtrain.data.clean.phases import Phase
from llmtrain.observe.interval import wilson

RATES = (0.002, 0.005, 0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.12, 0.2)  # share of words that an edit touches
BANDS = (0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0001)  # of similarity
LEAST_SIMILARITY = 0.5  # of a found pair that is counted as right


def real_words() -> Iterator[str]:
    """Yields the words of pydoc's topics, then of docstrings of the standard library, in the order of file names."""
    yield from chain.from_iterable(topics[name].split() for name in sorted(topics))
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                yield from (ast.get_docstring(node) or "").split()


def passages(count: int, passage_words: int) -> list[list[str]]:
    """Returns passages that do not overlap. Raises ValueError when there is less text."""
    text = real_words()
    found = [[word for _, word in zip(range(passage_words), text, strict=False)] for _ in range(count)]
    if len(found[-1]) < passage_words:
        raise ValueError(f"passages={count}: the standard library has fewer of {passage_words} words; ask for fewer")
    return found


def edited(passage: list[str], rate: float, kind: str, draw: random.Random) -> list[str]:
    """Returns a passage with a share of its words swapped or left out, or with that share of words around it."""
    if kind == "around":
        extra = [f"boilerplate{draw.randrange(10**9)}" for _ in range(round(4 * rate * len(passage)))]
        cut = draw.randint(0, len(extra))
        return extra[:cut] + passage + extra[cut:]
    touched = [draw.random() < rate for _ in passage]
    if kind == "deleted":
        return [word for word, out in zip(passage, touched, strict=True) if not out]
    return [draw.choice(passage) if other else word for word, other in zip(passage, touched, strict=True)]


def planted(count: int, passage_words: int, copies: int, seed: int) -> list[str]:
    """Returns `count` passages, each followed by `copies` edited ones, in a drawn order."""
    draw = random.Random(seed)
    texts = []
    for number, passage in enumerate(passages(count, passage_words)):
        texts.append(" ".join(passage))
        for copy in range(copies):
            kind = ("swapped", "deleted", "around")[(number + copy) % 3]
            texts.append(" ".join(edited(passage, draw.choice(RATES), kind, draw)))
    draw.shuffle(texts)
    return texts


def similarities(texts: list[str], ngram_words: int = 5) -> dict[tuple[int, int], float]:
    """Returns the Jaccard similarity of every pair of texts that share a shingle, by counting them."""
    holders: dict[tuple[str, ...], list[int]] = {}
    sizes = []
    for index, text in enumerate(texts):
        split = words(text)
        own = {tuple(split[i : i + ngram_words]) for i in range(len(split) - ngram_words + 1)}
        sizes.append(len(own))
        for shingle in own:
            holders.setdefault(shingle, []).append(index)
    common = Counter(chain.from_iterable(combinations(who, 2) for who in holders.values()))
    return {(a, b): shared / (sizes[a] + sizes[b] - shared) for (a, b), shared in common.items()}


def found_pairs(texts: list[str], settings: MinhashConfig) -> set[tuple[int, int]]:
    """Returns the pairs that share a band."""
    bands = Bands(settings)
    holders: dict[tuple[int, bytes], list[int]] = {}
    for index, text in enumerate(texts):
        for band, key in enumerate(bands.keys(text)):
            holders.setdefault((band, key), []).append(index)
    return set(chain.from_iterable(combinations(who, 2) for who in holders.values()))


def recalls(true: dict[tuple[int, int], float], found: set[tuple[int, int]]) -> list[Measured]:
    """Returns how many pairs of each band of similarity were found; the band's mean similarity stands for it."""
    measured = []
    for low, high in pairwise(BANDS):
        inside = {pair: s for pair, s in true.items() if low <= s < high}
        if inside:
            mean = sum(inside.values()) / len(inside)
            measured.append(Measured(mean, len(inside), len(inside.keys() & found)))
    return measured


def quality(count: int, passage_words: int, seed: int, settings: MinhashConfig) -> dict:
    """Returns recall by similarity beside the curve, and the share of found pairs that are near."""
    texts = planted(count, passage_words, 2, seed)
    true, found = similarities(texts, settings.ngram_words), found_pairs(texts, settings)
    rows = recalls(true, found)
    right = sum(true.get(pair, 0.0) >= LEAST_SIMILARITY for pair in found)
    table = [
        {
            "similarity": round(row.similarity, 3),
            "pairs": row.pairs,
            "found": row.found,
            "recall": round(row.found / row.pairs, 4),
            "interval": [round(end, 4) for end in wilson(row.found / row.pairs, row.pairs)],
            "curve": round(probability(row.similarity, settings.buckets, settings.hashes), 4),
        }
        for row in rows
    ]
    return {"documents": len(texts), "recall": table, "found": len(found), "of_similarity_0.5_or_more": right}


def write_documents(root: str, documents: int, tasks: int) -> float:
    """Writes documents of 50 to 350 words, a fifth of them edited copies of the one before. Returns MB of text."""
    draw, text = random.Random(0), list(real_words())
    size, passage = 0, []
    with RankWriter(f"{root}/cleaned/a") as writer:
        for index in range(documents):
            if index % 5 == 4:
                passage = edited(passage, 0.01, "swapped", draw)
            else:
                start = draw.randrange(len(text) - 350)
                passage = text[start : start + draw.randint(50, 350)]
            document = Document(" ".join(passage), f"{index}")
            size += len(document.text)
            writer.write(document, index % tasks)
    return size / 1e6


def run_phase(phase: Phase) -> tuple[float, float]:
    """Runs the tasks of a phase in turn. Returns CPU seconds, and by how many MB the memory grew at most."""
    began, before = time.process_time(), forget_peak()
    for rank in range(phase.tasks):
        data = None
        for step in deepcopy(phase.steps):
            data = step(data, rank, phase.tasks)
        deque(data or (), maxlen=0)
    return time.process_time() - began, (peak_bytes() - before) / 1e6


def scaled(documents: int, tasks: int, settings: DedupConfig) -> dict:
    """Runs all phases, each in a process of its own. Returns what each costs, and the disk that they fill."""
    fresh = get_context("spawn")
    with tempfile.TemporaryDirectory() as root:
        text_mb = write_documents(root, documents, tasks)
        source = CollectConfig(name="a", type="text", path="unused")
        costs = {}
        for phase in dedup_phases(settings, [source], root, {"a": tasks}, partitions=4):
            with fresh.Pool(1) as pool:
                cpu_s, grown_mb = pool.apply(run_phase, (phase,))
            costs[phase.name] = {"cpu_s": round(cpu_s, 3), "grown_mb": round(grown_mb, 1)}
        disk = sum(path.stat().st_size for path in Path(f"{root}/dedup").rglob("*") if path.is_file())
    total_s = sum(cost["cpu_s"] for cost in costs.values())
    sizes = {"documents": documents, "tasks": tasks, "text_mb": round(text_mb, 1)}
    return sizes | {"mb_per_cpu_s": round(text_mb / total_s, 2), "disk_mb": round(disk / 1e6, 1), "phases": costs}


def signature_speed() -> dict:
    """Returns MB a CPU second of ours and of datatrove's step over pydoc's topics, the latter without spaCy too."""
    texts, settings = list(topics.values()), MinhashConfig()
    bands = Bands(settings)
    theirs = MinhashDedupSignature("unused", DatatroveConfig(hash_config=HashConfig(precision=32)))
    rows = {"ours": lambda text: list(bands.keys(text))}
    rows["datatrove"] = lambda text: theirs.get_signature(theirs.get_shingles(text))
    speeds = {name: speed(row, texts) for name, row in rows.items()}
    theirs.word_tokenizer = WhiteSpace()
    return speeds | {"datatrove, words split at white space": speed(rows["datatrove"], texts)}


class WhiteSpace:
    """Splits words as ours does, in place of datatrove's spaCy."""

    def word_tokenize(self, text: str) -> list[str]:
        """Returns the words."""
        return text.split()


def speed(function: Callable[[str], object], texts: list[str]) -> float:
    """Returns MB of text a CPU second, of the second of two rounds."""
    for _ in range(2):
        began = time.process_time()
        for text in texts:
            function(text)
        spent_s = time.process_time() - began
    return round(sum(map(len, texts)) / 1e6 / spent_s, 2)


def main() -> None:
    """Prints the record, and writes it and the curve where it is told."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--passages", type=int, default=700, help="each with two edited copies")
    parser.add_argument("--words", type=int, default=150, help="of a passage")
    parser.add_argument("--documents", default="2000,20000", help="sizes for speed and memory")
    parser.add_argument("--out", help="file of the record; the curve goes beside it as PNG")
    args = parser.parse_args()
    settings = MinhashConfig()
    record = {
        "environment": environment("benchmarks.dedup", ("datatrove", "numpy", "xxhash"), 1),
        "quality": quality(args.passages, args.words, 0, settings),
        "signatures_mb_per_cpu_s": signature_speed(),
        "scale": [
            scaled(int(size), tasks, DedupConfig(paragraphs=ParagraphConfig()))
            for size in args.documents.split(",")
            for tasks in (1, 4)
        ],
    }
    print(json.dumps(record, indent=1))
    if args.out:
        Path(args.out).write_text(json.dumps(record, indent=1) + "\n")
        measured = [Measured(row["similarity"], row["pairs"], row["found"]) for row in record["quality"]["recall"]]
        draw_curve(str(Path(args.out).with_suffix(".png")), settings.buckets, settings.hashes, measured)


if __name__ == "__main__":
    main()
