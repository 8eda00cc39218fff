"""The report of cleaning, from what real datatrove pipelines of toy steps leave."""

from __future__ import annotations

import base64
import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datatrove")

from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep

from llmtrain.config.clean import CleanConfig, CollectConfig
from llmtrain.data.clean import report_samples
from llmtrain.data.clean.dedup.curve import probability
from llmtrain.data.clean.files import RankWriter
from llmtrain.data.clean.report import merged, write_report
from llmtrain.data.clean.report_samples import Looked, Reservoir, look_at_kept, visible
from llmtrain.data.clean.step import Step

NASTY = "<script>alert(1)</script></script> & \x00\x07 \u202egnirts $\\x$"
INPUTS = [CollectConfig(name=name, type="jsonl", path="rows") for name in ("web", "book")]


class Read(PipelineStep):
    """Yields rank's documents: 10 of them, 'word ' 1 to 10 times, the last one nasty."""

    type, name = "collect", "read"

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Any:
        self.stat_update("files", value=2)
        self.stat_update("dropped/too_large", value=3)
        for i in range(1, 11):
            text = NASTY if i == 10 else "word " * i
            self.stat_update("documents_out")
            self.stat_update("bytes_out", value=len(text.encode()))
            data = {"source": self.source, "kind": "web", "language": NASTY if i == 10 else "en", "url": NASTY}
            yield Document(text, f"{self.source}/{rank}/{i}", metadata=data)


def short(least: int) -> Any:
    return lambda document: "too_short" if len(document.text) < least else None


class Marked:
    """Replaces `word` once, and counts it."""

    def __init__(self, _: None) -> None:
        self.counts = Counter()

    def __call__(self, document: Document) -> None:
        found = "word" in document.text
        document.metadata["pii"] = {"email": int(found)}
        document.text = document.text.replace("word", "<EMAIL>", 1)


def copies(_: None) -> Any:
    def check(document: Document) -> str | None:
        if document.id.endswith("/5"):
            document.metadata["copy_of"] = document.id[:-1] + "6"
            return "near"
        return None

    return check


def run(root: Path, name: str, steps: list, tasks: int) -> None:
    executor = LocalPipelineExecutor(steps, tasks=tasks, logging_dir=f"{root}/logs/{name}")
    for rank in range(tasks):
        for step in steps:  # a task has its own counts
            step.stats = type(step.stats)(str(step))
        executor._run_for_rank(rank, local_rank=1)


def clean(root: Path, name: str, tasks: int = 2) -> None:
    """10 documents a task are read, 3 have fewer than 20 characters."""
    dropped = f"{root}/dropped/{name}/quality"
    steps = [Read(name), Step("quality", short, 20, RankWriter(dropped), 20), Step("pii", Marked, None)]
    run(root, f"clean-{name}", [*steps, RankWriter(f"{root}/cleaned/{name}")], tasks)


def dedup(root: Path, name: str, tasks: int = 2) -> None:
    """Each of the 7 documents of a task that are left comes in, one goes."""
    steps = [
        Stored(root / "cleaned" / name),
        Step("dedup", copies, None, RankWriter(f"{root}/dedup/dropped/{name}"), 20),
    ]
    run(root, f"dedup-{name}", [*steps, RankWriter(f"{root}/documents/{name}")], tasks)


class Stored(PipelineStep):
    """Yields the documents of a rank's file, and counts nothing."""

    type, name = "dedup", "read"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Any:
        for row in report_samples.rows_in(self.folder / f"{rank:05d}.jsonl.zst", Looked()):
            yield Document(row["text"], row["id"], metadata=row["metadata"])


TASKS = {"clean-web": 2, "clean-book": 2, "dedup-web": 2, "dedup-book": 2}


class Page(HTMLParser):
    """Tags, image sources and text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.images: list[str] = []
        self.raw = path.read_text(encoding="utf-8")
        self.words: list[str] = []
        self.feed(self.raw)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.images += [value for name, value in attrs if name in ("src", "href") and tag in ("img", "link", "script")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def report(root: Path, settings: CleanConfig | None = None, **tasks: int) -> tuple[Page, dict[str, Any]]:
    path = write_report(
        str(root), settings or CleanConfig(), INPUTS, {name.replace("_", "-"): n for name, n in tasks.items()} or TASKS
    )
    return Page(path), json.loads(path.with_name("report.json").read_text())


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("clean")
    for name in ("web", "book"):
        clean(root, name)
    for name in ("web", "book"):
        dedup(root, name)
    (root / "classifier").mkdir()
    notes = {"identity": {"seed": 1}, "measured": {"auc": 0.9375, "kept_share": {"good": 0.75}}}
    (root / "classifier" / "classifier.json").write_text(json.dumps(notes))
    return root


def test_numbers_of_a_whole_run(done: Path) -> None:
    page, numbers = report(done)
    steps = {(s["input"], s["step"]): s for s in numbers["steps"]}
    assert list(steps) == [(i, s) for i in ("web", "book") for s in ("read", "quality", "pii", "dedup")]
    read, quality, dedup = (steps["web", name] for name in ("read", "quality", "dedup"))
    nasty = len(NASTY.encode())
    assert (read["documents_in"], read["documents_out"], read["files"]) == (26, 20, 4)
    assert read["dropped"] == {"too_large": 6}
    assert (quality["documents_in"], quality["documents_out"], quality["dropped"]) == (20, 14, {"too_short": 6})
    assert quality["bytes_in"] == read["bytes_out"] == 2 * (5 * 45 + nasty)
    assert quality["bytes_out"] == steps["web", "pii"]["bytes_in"] == 2 * (5 * 39 + nasty)
    assert steps["web", "pii"]["bytes_out"] == 2 * (5 * 39 + nasty + 6 * 3)  # <EMAIL> is longer
    assert (dedup["documents_in"], dedup["documents_out"], dedup["dropped"]) == (14, 12, {"near": 2})
    assert dedup["phase"] == "dedup-web" and quality["seconds"] > 0 < quality["mb_per_s"]
    assert numbers["faults"] == numbers["unfinished"] == [] and "Does not add up" not in page.text
    assert "checked in every task, and from phase to phase" in page.text
    for shown in ("too_short 6", "near 2", "too_large 6", "70.0%", "web 4 26 12 46.2%"):
        assert shown in page.text


def test_texts_that_were_looked_at(done: Path) -> None:
    page, numbers = report(done)
    before, after = (numbers["looked_at"][folder]["book"] for folder in ("cleaned", "documents"))
    assert before["documents"] == 14 and after["documents"] == 12 and after["files"] == after["files_read"] == 2
    # 4 to 9 words, one replaced: 23, 28, 33, 38, 43, 48 characters; and the nasty one, of 53
    assert before["characters"] == {"16": 4, "32": 10}
    assert sum(before["languages"].values()) == 14 and before["languages"]["en"] == 12
    assert before["pii"] == {"email": 12}
    assert "book, at the end: 12 documents looked at, from the starts of 2 of 2 files" in page.text
    assert numbers["classifier"] == {"auc": 0.9375, "kept_share.good": 0.75} and "0.9375" in page.text
    assert numbers["minhash"]["0.8"] == pytest.approx(0.92356, abs=1e-4)  # 1 - (1 - 0.8^8)^14
    assert page.text.count("A copy, and what stays") == 4  # two files of two inputs
    assert page.text.count("copy of web/0/6") == 1 and "What stays is not among" not in page.text


def test_the_page_is_one_file_and_documents_cannot_break_it(done: Path) -> None:
    page, _ = report(done)
    assert "script" not in page.tags and "link" not in page.tags and len(page.images) == 5
    for image in page.images:
        kind, _, data = image.partition(",")
        assert kind == "data:image/png;base64" and base64.b64decode(data)[:4] == b"\x89PNG"
    assert "<script>alert(1)</script></script> & \\u0000\\u0007 \\u202egnirts $\\x$" in page.text
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e\ud800-\udfff]", page.raw)
    assert "http" not in re.sub("<pre.*?</pre>", "", page.raw, flags=re.S)


def test_in_mid_run_it_shows_what_is_done(tmp_path: Path) -> None:
    page, numbers = report(tmp_path)
    assert "No task is done yet" in page.text and numbers["steps"] == []
    clean(tmp_path, "web")
    (tmp_path / "logs" / "clean-web" / "completions" / "00001").unlink()  # killed before the mark
    whole = (tmp_path / "cleaned" / "web" / "00001.jsonl.zst").read_bytes()
    (tmp_path / "cleaned" / "web" / "00001.jsonl.zst").write_bytes(whole[: len(whole) // 2])
    page, numbers = report(tmp_path)
    assert numbers["unfinished"] == ["clean-web 1 of 2", "clean-book 0 of 2"] and numbers["faults"] == []
    assert "clean-web 1 of 2, clean-book 0 of 2." in page.text
    assert [s["documents_out"] for s in numbers["steps"]] == [10, 7, 7]
    assert 7 <= numbers["looked_at"]["cleaned"]["web"]["documents"] < 14 and "before deduplication" in page.text


def undrawn(*_: object) -> dict[str, bytes]:
    """Stands for `drawn` where a test looks at numbers only: plots take seconds."""
    return {}


def edit(root: Path, phase: str, rank: int, block: int, label: str, value: Any) -> None:
    path = root / "logs" / phase / "stats" / f"{rank:05d}.json"
    blocks = json.loads(path.read_text())
    blocks[block]["stats"][label] = value
    path.write_text(json.dumps(blocks))


def test_what_does_not_add_up_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmtrain.data.clean.report.drawn", undrawn)
    for name in ("web", "book"):
        clean(tmp_path, name)
        dedup(tmp_path, name)
    edit(tmp_path, "clean-web", 0, 1, "dropped/too_short", 2)
    edit(tmp_path, "clean-web", 1, 1, "dropped/too_short", 4)  # the sums agree, the tasks do not
    edit(tmp_path, "clean-book", 1, 1, "bytes_out", {"total": 1})
    edit(tmp_path, "clean-book", 1, 3, "total", 6)
    edit(tmp_path, "dedup-book", 0, 1, "documents_in", 8)
    (tmp_path / "logs" / "dedup-web" / "stats" / "00001.json").write_text('[{"name": ')
    (tmp_path / "logs" / "clean-old" / "completions").mkdir(parents=True)
    page, numbers = report(tmp_path)
    lost = 5 * 39 + len(NASTY.encode()) - 1
    assert sorted(numbers["faults"]) == sorted(
        [
            "clean-old: is no phase of this configuration; its counts are left out",
            "clean-web: documents into `quality` are not those kept and dropped: 2 unaccounted for"
            " (tasks: 2, the first 00000)",
            f"clean-book: bytes out of `quality` are not those into `pii`: {lost:,} unaccounted for"
            " (tasks: 1, the first 00001)",
            "clean-book: documents out of `pii` are not those written: 1 unaccounted for (tasks: 1, the first 00001)",
            "dedup-book: documents into `dedup` are not those kept and dropped: 1 unaccounted for"
            " (tasks: 1, the first 00000)",
            "dedup-book: documents out of clean-book are not those into it: 1 unaccounted for",
            "dedup-web: counts cannot be read (JSONDecodeError) (tasks: 1, the first 00001)",
            "dedup-web: documents out of clean-web are not those into it: 7 unaccounted for",
        ]
    )
    assert "Does not add up" in page.text and all(line in page.text for line in numbers["faults"])


def test_phases_over_all_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("web", "book"):
        clean(tmp_path, name, tasks=1)
    (tmp_path / "all").mkdir()
    for rank, name in enumerate(("web", "book")):
        (tmp_path / "all" / f"{rank:05d}.jsonl.zst").symlink_to(tmp_path / "cleaned" / name / "00000.jsonl.zst")
    run(tmp_path, "near", [Stored(tmp_path / "all"), Step("near", copies, None)], 2)
    tasks = {"clean_web": 1, "clean_book": 1, "near": 2}
    _, numbers = report(tmp_path, **tasks)
    assert numbers["faults"] == [] and numbers["steps"][-1]["input"] == "all inputs"
    assert (numbers["steps"][-1]["documents_in"], numbers["steps"][-1]["documents_out"]) == (14, 12)
    monkeypatch.setattr("llmtrain.data.clean.report.drawn", undrawn)
    edit(tmp_path, "near", 0, 1, "documents_in", 6)
    edit(tmp_path, "near", 0, 1, "documents_out", 5)
    _, numbers = report(tmp_path, **tasks)
    assert numbers["faults"] == [
        "near: documents out of clean-web, clean-book are not those into it: 1 unaccounted for"
    ]
    _, numbers = report(tmp_path, **(tasks | {"near": 3}))  # one task is missing, so are its documents
    assert numbers["faults"] == [] and numbers["unfinished"] == ["near 2 of 3"]


def test_the_rest_of_a_directory_is_not_replaced(tmp_path: Path) -> None:
    report(tmp_path)
    report(tmp_path)
    (tmp_path / "report" / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match=r"mine\.txt"):
        report(tmp_path)


def write_lines(path: Path, lines: bytes) -> Path:
    import zstandard

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(zstandard.compress(lines))
    return path


def test_only_so_many_documents_are_looked_at(tmp_path: Path) -> None:
    row = b'{"text": "abc", "id": "1", "metadata": {"language": "en"}}\n'
    paths = [write_lines(tmp_path / f"{i}.jsonl.zst", row * 50) for i in range(10)]
    looked = look_at_kept(paths, 3, most=100)
    assert (looked.documents, looked.files, looked.files_read) == (100, 10, 10)  # ten of each
    assert looked.lengths == {2: 100} and len(looked.samples[()].kept) == 3
    looked = look_at_kept(paths, 3, most=4)
    assert (looked.documents, looked.files, looked.files_read) == (4, 10, 4)


def test_hostile_rows_are_counted_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_samples, "MOST_LINE_BYTES", 5000)
    rows = [b'{"text": "a\\ud800", "id": "x"}', b"[1]", b"[" * 4000, b"\xff{", b'{"text": "' + b"b" * 20_000 + b'"}']
    rows += [json.dumps({"text": "t", "metadata": {"language": f"l{i}" * 50}}).encode() for i in range(300)]
    rows += [b'{"text": null, "id": 7, "metadata": {"pii": [1], "url": {"a": 1}}}']
    looked = look_at_kept([write_lines(tmp_path / "a.jsonl.zst", b"\n".join(rows))], 1000)
    assert (looked.documents, looked.unreadable) == (302, 4)
    assert len(looked.languages) == 201 and max(map(len, looked.languages)) == 61
    assert looked.languages[report_samples.OTHERS] == 300 - 199  # one of 200 names is (unknown)
    first = looked.samples[()].kept[0]
    assert first["text"] == "a\\ud800" and json.dumps(first)
    assert looked.samples[()].kept[-1]["url"] == "{'a': 1}"


def test_a_sample_is_drawn_evenly() -> None:
    drawn = Counter()
    for start in range(400):
        sample = Reservoir(5)
        sample.draw.seed(start)
        for i in range(20):
            sample.add(i)
        drawn.update(sample.kept)
    assert sum(drawn.values()) == 2000 and min(drawn.values()) > 70 and max(drawn.values()) < 130  # 100 each


def test_small_parts() -> None:
    assert visible("ab\n\tc\x1b[31m\u2066", 100) == "ab\n\tc\\u001b[31m\\u2066"
    assert visible("x" * 11, 10) == "x" * 10 + "…" and visible("x" * 10, 10) == "x" * 10
    assert merged([["a", "c"], ["a", "b", "c", "d"], []]) == ["a", "b", "c", "d"]
    assert probability(1.0, 14, 8) == 1.0 and probability(0.0, 14, 8) == 0.0
    assert probability(0.5, 2, 1) == 0.75
