"""Compares the cleaning chain with datatrove's own: CPU-seconds on the same pages, with the same survivors; and
tokenizing and reading rows with their peers (benchmarks.data_loader).

Pages come from a folder of `*.html` and `*.html.gz`, else from `pydoc`, which renders the standard library. Each is
seen once: the first part warms up, the others are the rounds, so that words that a part brings anew are paid for in it.

    python -m benchmarks.data [--cases chain] [--pages FOLDER] [--out benchmarks/results/data_chain.json]
"""

from __future__ import annotations

import argparse
import gzip
import html
import importlib
import json
import pydoc
import statistics
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from multiprocessing import current_process, set_start_method
from pathlib import Path

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.extractors import Trafilatura
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.pipeline.formatters import FTFYFormatter

from benchmarks.common import Turns, compete, environment
from benchmarks.data_loader import loader_case, tokenize_case
from llmtrain.config.clean import CleanConfig
from llmtrain.data.clean.chain import make
from llmtrain.data.clean.step import Step

Pages = list[str]
CHAIN = ("extract", "repair", "repetition", "quality", "c4", "fineweb")
WANTED = 2.0  # times as fast as datatrove's chain
SKIPPED = {"antigravity", "this", "idlelib", "lib2to3"}  # modules that do something when they are imported


def folder_pages(folder: str) -> Pages:
    """Returns the pages of a folder, in the order of their names."""
    files = sorted(path for path in Path(folder).rglob("*.html*") if path.suffix in (".html", ".gz"))
    read = {".gz": lambda path: gzip.decompress(path.read_bytes()), ".html": Path.read_bytes}
    return [read[path.suffix](path).decode("utf-8", "replace") for path in files]


def pydoc_pages() -> Pages:
    """Returns pages of the standard library and of the topics of the language, as `pydoc` renders them."""
    names = sorted(name for name in sys.stdlib_module_names if not name.startswith("_") and name not in SKIPPED)
    topics = importlib.import_module("pydoc_data.topics").topics
    prose = [
        "".join(f"<p>{html.escape(part)}</p>" for part in text.split("\n\n")) for _, text in sorted(topics.items())
    ]
    pages = [page for name in names if (page := module_page(name))]
    mixed = [page for pair in zip(pages, prose, strict=False) for page in pair]
    return [f"<html><body><article>{page}</article></body></html>" for page in mixed]


def module_page(name: str) -> str | None:
    """Returns the page of a module; None if it cannot be imported here."""
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()), warnings.catch_warnings(action="ignore"):
            return pydoc.HTMLDoc().docmodule(importlib.import_module(name))
    except Exception:  # some are of another system, or without a part that this Python was built without
        return None


def theirs(extract: bool) -> list[PipelineStep]:
    """Returns datatrove's chain with its defaults, but for what would make other texts: the extractor has our options
    and timeout, and the formatter ours."""
    extractor = [Trafilatura(favour_precision=False, deduplicate=False, timeout=10)] if extract else []
    repair = FTFYFormatter(fix_line_breaks=True, normalization="NFC")
    return [
        *extractor,
        repair,
        GopherRepetitionFilter(),
        GopherQualityFilter(),
        C4QualityFilter(),
        FineWebQualityFilter(),
    ]


def ours(extract: bool) -> list[PipelineStep]:
    """Returns our chain. The checks outlive a round, as they outlive a page in a task."""
    clean = CleanConfig()
    checks = {name: make((name, getattr(clean, name), clean.words)) for name in CHAIN[not extract :]}
    return [
        Step(name, lambda settings, check=check: lambda document: check(document), None)
        for name, check in checks.items()
    ]


def contestant(turns: Turns, parts: list[Pages], chain: Callable[[bool], list[PipelineStep]], extract: bool) -> None:
    """Runs a chain on one part each turn; reports ids and texts of the survivors, and the seconds in every step."""
    current_process()._config["daemon"] = False  # a daemon may start no process, as datatrove's extractor does
    set_start_method("fork", force=True)  # the default, where a process was not spawned itself
    steps = chain(extract)
    for number, part in enumerate(parts):
        turns.wait()
        before = [step.stats.time_stats.total for step in steps]
        data = iter([Document(text, f"{number}/{place}", metadata={"kind": "web"}) for place, text in enumerate(part)])
        for step in steps:
            data = step.run(data)
        kept = [(document.id, document.text) for document in data]
        spent = [step.stats.time_stats.total - b for step, b in zip(steps, before, strict=True)]
        turns.done({"kept": kept, "steps_s": dict(zip(CHAIN[not extract :], spent, strict=True))})
    turns.wait()


def theirs_contestant(turns: Turns, parts: list[Pages], extract: bool) -> None:
    contestant(turns, parts, theirs, extract)


def ours_contestant(turns: Turns, parts: list[Pages], extract: bool) -> None:
    contestant(turns, parts, ours, extract)


def raced(parts: list[Pages], extract: bool) -> dict:
    """Returns the CPU-seconds of both chains in every round. Raises AssertionError if a survivor differs."""
    racers = {"datatrove": theirs_contestant, "llmtrain": ours_contestant}
    found = compete(racers, (parts, extract), threads=1, warmup=1, work=1, rounds=len(parts) - 1)
    for number, (first, second) in enumerate(zip(*found.values(), strict=True)):
        a, b = first["values"][0]["kept"], second["values"][0]["kept"]
        assert a == b, f"round {number}: survivors differ: {sorted({x[0] for x in a} ^ {x[0] for x in b})[:5]}"
    rounds = {name: [round(turn["cpu_s"], 3) for turn in turns[1:]] for name, turns in found.items()}
    ratios = [a / b for a, b in zip(*rounds.values(), strict=True)]
    return {
        "pages": sum(map(len, parts[1:])),
        "survivors": sum(len(turn["values"][0]["kept"]) for turn in found["llmtrain"][1:]),
        "mb_in": sum(len(text.encode()) for part in parts[1:] for text in part) / 1e6,
        "cpu_s": rounds,
        "warmup_cpu_s": {name: round(turns[0]["cpu_s"], 3) for name, turns in found.items()},
        "speed": sum(rounds["datatrove"]) / sum(rounds["llmtrain"]),
        "speed_rounds": [round(ratio, 2) for ratio in ratios],
        "steps_s": {name: step_sums(turns[1:]) for name, turns in found.items()},
    }


def step_sums(turns: list[dict]) -> dict[str, float]:
    """Returns the seconds that each step took over all rounds."""
    names = turns[0]["values"][0]["steps_s"]
    return {name: round(sum(turn["values"][0]["steps_s"][name] for turn in turns), 3) for name in names}


def texts_of(pages: Pages) -> Pages:
    """Returns the main texts of pages."""
    from trafilatura import extract

    return [extract(page, include_comments=False) or "" for page in pages]


def chain_case(pages: Pages, parts: int) -> dict[str, dict]:
    """Returns the figures of the whole chain, and of the chain from the extracted text on."""
    cut = [pages[number::parts] for number in range(parts)]
    found = {"pages": raced(cut, True), "texts": raced([texts_of(part) for part in cut], False)}
    for name, result in found.items():
        steps = ", ".join(f"{step} {spent:.2f}" for step, spent in result["steps_s"]["llmtrain"].items())
        sums = ", ".join(f"{of} {sum(spent):.2f}" for of, spent in result["cpu_s"].items())
        print(f"from {name}: {result['speed']:.2f}x (rounds {result['speed_rounds']}); CPU-s: {sums}")
        print(f"  {result['pages']} in, {result['survivors']} out, {result['mb_in']:.1f} MB; s in our steps: {steps}")
    verdict = "met" if found["pages"]["speed"] >= WANTED else "MISSED"
    median = statistics.median(found["pages"]["speed_rounds"])
    print(f"wanted, the whole chain at least {WANTED}x: {verdict}; median of the rounds {median:.2f}x")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default="chain,tokenize,loader", help="some of chain,tokenize,loader")
    parser.add_argument("--pages", help="folder of HTML pages; pydoc's of the standard library without it")
    parser.add_argument("--parts", type=int, default=5, help="one to warm up, the others are rounds")
    parser.add_argument("--out", help="JSON file to write")
    args = parser.parse_args()
    cases = {
        "chain": lambda: chain_case(folder_pages(args.pages) if args.pages else pydoc_pages(), args.parts),
        "tokenize": tokenize_case,
        "loader": loader_case,
    }
    if unknown := set(args.cases.split(",")) - set(cases):
        parser.error(f"--cases={args.cases}: {sorted(unknown)} is none of {sorted(cases)}")
    result = {name: cases[name]() for name in args.cases.split(",")}
    if args.out:
        versions = environment("benchmarks.data", ("datatrove", "trafilatura", "spacy", "ftfy"), 1)
        Path(args.out).write_text(json.dumps({**versions, "results": result}, indent=2) + "\n")


if __name__ == "__main__":
    main()
