"""Measures how often search finds the right document: the article that goes with a headline, among 164 real news pages.

The pages are those of the article extraction benchmark of Scrapinghub (data set `html`). A question is the headline in
the head of a page, a document the body of its article without it; found is a document when one of its passages stands
among the first k.

    python -m benchmarks.search --data ../shared/data/html [--model DIRECTORY] [--out benchmarks/results/search.json]

With `--questions FILE` it writes rows for `configs/search/handbook.yaml` instead: whole numbers that are defaults in
docs/configuration.md, each asked for by its key.
"""

from __future__ import annotations

import argparse
import gzip
import html
import json
import random
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.common import environment
from llmtrain.config.index import IndexConfig
from llmtrain.data.clean.read.text import declared, decode
from llmtrain.data.search.build import build, identity, listed_files
from llmtrain.data.search.store import Store, open_store
from llmtrain.observe.owned import replacing

HEADLINE = re.compile(r"""<meta[^>]*property=["']og:title["'][^>]*content=(["'])(.*?)\1""", re.I | re.S)
ROW = re.compile(r"^\| `([a-z_.]+)` \| integer[^|]*\| `(\d+)` \|", re.M)
KS = (1, 3, 10)
QUESTIONS = 64
PACKAGES = ("bm25s", "torch", "transformers")


def pages(data: Path) -> Iterator[tuple[str, str, str]]:
    """Yields (id, headline, text) of the pages that name a headline."""
    for name, article in sorted(json.loads((data / "ground-truth.json").read_text()).items()):
        raw = gzip.decompress((data / "html" / f"{name}.html.gz").read_bytes())
        if found := HEADLINE.search(decode(raw, declared(raw))[0]):
            yield name, html.unescape(found[2]).strip(), article["articleBody"]


def store_of(rows: list[tuple[str, str, str]], folder: Path, model: str | None) -> str:
    """Returns the directory of a store of the articles."""
    lines = (json.dumps({"id": name, "text": text}) for name, _, text in rows)
    (folder / "articles.jsonl").write_text("\n".join(lines))
    entry = {"path": str(folder / "articles.jsonl"), "id_field": "id"}
    index = IndexConfig.model_validate({"documents": [entry], "model": model})
    files = listed_files(index)
    with replacing(folder / "store", "llmtrain index") as directory:
        build(index, files, identity(index, files), directory, "cpu")
    return str(folder / "store")


def measured(store: Store, rows: list[tuple[str, str, str]]) -> dict[str, float]:
    """Returns recall@k, the mean reciprocal rank among the first ten, and the CPU time of a question."""
    start, ranks = time.process_time(), []
    for name, headline, _ in rows:
        found = [hit.passage.document for hit in store.search(headline, max(KS))]
        ranks.append(found.index(name) + 1 if name in found else None)
    ms = 1000 * (time.process_time() - start) / len(rows)
    recalls = {f"recall@{k}": fmean(rank is not None and rank <= k for rank in ranks) for k in KS}
    return {**recalls, "mrr@10": fmean(1 / rank if rank else 0.0 for rank in ranks), "cpu_ms_per_question": ms}


def questions(path: Path) -> None:
    """Writes rows of keys of the configuration and their defaults."""
    table = (Path(__file__).parents[1] / "docs" / "configuration.md").read_text(encoding="utf-8")
    found = sorted(set(ROW.findall(table)))
    chosen = random.Random(0).sample(found, QUESTIONS)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ({"question": f"What is the default value of {key}?", "answer": value} for key, value in chosen)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/html"))
    parser.add_argument("--model", help="directory of an encoder, for embedding and hybrid")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--questions", type=Path)
    options = parser.parse_args()
    if options.questions is not None:
        questions(options.questions)
        return
    rows, result = list(pages(options.data)), dict[str, Any]()
    with tempfile.TemporaryDirectory() as folder:
        directory = store_of(rows, Path(folder), options.model)
        for mode in ("bm25", "embedding", "hybrid") if options.model else ("bm25",):
            store = open_store(directory, mode)
            result[mode] = measured(store, rows)
            print(mode, {name: round(value, 3) for name, value in result[mode].items()})
    encoder = None if options.model is None else "/".join(Path(options.model).parts[-2:])
    told = {"articles": len(rows), "passages": len(store), "encoder": encoder, **result}
    if options.out is not None:
        described = environment("benchmarks.search", PACKAGES, torch.get_num_threads())
        options.out.write_text(json.dumps({**described, **told}, indent=2) + "\n")


if __name__ == "__main__":
    main()
