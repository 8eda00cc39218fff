"""Checks the extraction of main texts: pages that hang, crash or nest are counted and cost no other page; and the F1 on
the pages of article-extraction-benchmark, by its own matching."""

from __future__ import annotations

import gzip
import json
import os
import re
import resource
import statistics
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("trafilatura")
pytest.importorskip("datatrove")

from datatrove.data import Document

from llmtrain.config.clean.web import ExtractConfig, WordsConfig
from llmtrain.data.clean.extract import Extractor, make

ROOT = Path(__file__).parents[3]
PLACE = Path(os.environ.get("LLMTRAIN_HTML", ROOT.parent / "shared" / "data" / "html"))
TEXT = "This is the first sentence of an article that has something to say. And this is another one, a little longer."
PAGE = f"<html><body><nav>Home</nav><article><h1>Title</h1><p>{TEXT}</p></article></body></html>"


@pytest.fixture(scope="module")
def extractor() -> Iterator[Extractor]:
    found = make(ExtractConfig(), WordsConfig())
    yield found
    found.close()


def page(text: str) -> Document:
    return Document(text, "0", metadata={"kind": "web"})


def test_the_main_text_replaces_the_page(extractor: Extractor) -> None:
    document = page(PAGE)
    assert extractor(document) is None and document.text == f"Title\n{TEXT}"


@pytest.mark.parametrize("text", ["", " ", "no markup", "<html></html>", "\x00" * 10, "<p>\ud800", "<!--"])
def test_pages_without_main_text_are_empty(extractor: Extractor, text: str) -> None:
    assert extractor(page(text)) == "empty"


@pytest.mark.parametrize("tag", ["div", "b", "table><tr><td", "ul><li"])
def test_deep_nesting_ends_no_other_page(extractor: Extractor, tag: str) -> None:
    document = page(f"<{tag}>" * 30_000 + TEXT)
    assert extractor(document) in (None, "empty", "failed", "crashed", "timeout")
    assert extractor(page(PAGE)) is None


def test_a_page_that_takes_too_long_is_given_up(extractor: Extractor) -> None:
    slow = Extractor(ExtractConfig(timeout_s=0.01))
    try:
        assert slow(page(PAGE * 2000)) == "timeout" and slow.process is None
    finally:
        slow.close()


def test_a_process_that_dies_is_started_anew(extractor: Extractor) -> None:
    assert extractor(page(PAGE)) is None
    extractor.process.kill()
    assert extractor(page(PAGE)) == "crashed"
    assert extractor(page(PAGE)) is None


def test_memory_is_bounded() -> None:
    """A tree of millions of elements does not fit; the library may say that such a page is empty."""
    small = Extractor(ExtractConfig(memory_gib=0.5, timeout_s=60))
    try:
        assert small(page(PAGE)) is None
        assert resource.prlimit(small.process.pid, resource.RLIMIT_AS) == (2**29, 2**29)
        assert small(page("<p>a" * 4_000_000)) in ("crashed", "failed", "empty")
        assert small(page(PAGE)) is None
    finally:
        small.close()


def test_a_process_that_cannot_start_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"data.clean.extract.memory_gib=0.01: .*allow more"):
        Extractor(ExtractConfig(memory_gib=0.01))(page(PAGE))


def shingles(text: str) -> Counter:
    """Returns the runs of four words of a text, as article-extraction-benchmark counts them."""
    words = re.findall(r"\w+", text)
    return Counter(tuple(words[at : at + 4]) for at in range(max(1, len(words) - 3)) if words)


def test_f1_on_news_pages_is_the_librarys_own(extractor: Extractor) -> None:
    """Precision and recall are means over pages of those by shingles, and F1 is that of the means."""
    if not (PLACE / "ground-truth.json").is_file():
        pytest.skip(f"{PLACE} has no pages; LLMTRAIN_HTML names another directory")
    precisions, recalls = [], []
    for name, truth in json.loads((PLACE / "ground-truth.json").read_text()).items():
        document = page(gzip.decompress((PLACE / "html" / f"{name}.html.gz").read_bytes()).decode())
        text = "" if extractor(document) else document.text
        wanted, found = shingles(truth["articleBody"]), shingles(text)
        both = (wanted & found).total()
        precisions += [both / found.total()] if found else []
        recalls.append(both / wanted.total())
    precision, recall = statistics.mean(precisions), statistics.mean(recalls)
    assert 2 * precision * recall / (precision + recall) >= 0.958
