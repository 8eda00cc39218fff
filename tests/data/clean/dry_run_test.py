"""The dry run: how it samples, what each step drops, and what other thresholds would keep."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datatrove")

from datatrove.data import Document
from datatrove.pipeline.readers import JsonlReader
from pydantic import Field
from rich.console import Console

from llmtrain.config.clean import CollectConfig
from llmtrain.config.section import Section, Share
from llmtrain.data.clean import dry_run as module
from llmtrain.data.clean.chain import Listed
from llmtrain.data.clean.dry_run import DryRun, dry_run, numbers, others, replaced, sample, shown


class Words(Section):
    min_words: int = 4
    shares: dict[str, Share] = Field({"a": 0.5})
    timeout_s: float = 1.0
    seed: int = 1
    flag: bool = True


class Clean(Section):
    """Stands for CleanConfig, with toy steps."""

    words: int = 7
    extract: Words | None = Words()
    quality: Words | None = Words()
    classifier: Words | None = None


STEPS = (Listed("extract", "web"), Listed("quality", "web prose"), Listed("classifier", "web prose"))
calls: list[str] = []


def make(named: tuple[str, Words, int]) -> Any:
    """extract: adds a word, and drops what has none. quality: drops short texts, and those with too many a."""
    name, settings, words = named
    assert words == 7
    if name == "classifier":
        raise ValueError("not trained yet")

    def check(document: Document) -> str | None:
        calls.append(name)
        if name == "extract":
            document.text += " more"
            return "empty" if document.text == " more" else None
        split = document.text.split()
        document.metadata["nested"]["seen"] = document.metadata["nested"].get("seen", 0) + 1
        assert document.metadata["nested"]["seen"] == 1  # each value sees the document as it came
        if len(split) < settings.min_words:
            return "too_short"
        return "too_many_a" if split.count("a") / len(split) > settings.shares["a"] else None

    return check


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STEPS", STEPS)
    monkeypatch.setattr(module, "make", make)
    calls.clear()


def written(folder: Path, texts: dict[str, list[str]]) -> Path:
    folder.mkdir(parents=True)
    for name, rows in texts.items():
        lines = [json.dumps({"text": text, "id": f"{name}/{i}", "nested": {}}) for i, text in enumerate(rows)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def reader(source: CollectConfig) -> JsonlReader:
    return JsonlReader(source.path, default_metadata={"kind": source.kind, "source": source.name})


def entry(path: Path, kind: str = "prose") -> CollectConfig:
    return CollectConfig(name=path.name, type="jsonl", path=str(path), kind=kind)


def test_each_step_and_other_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page gets a fourth word, so that it is long enough; prose of three words is not."""
    texts = [" ".join("b" * n) for n in range(1, 11)]  # one to ten words
    inputs = [
        entry(written(tmp_path / "pages", {"x": ["b b b", " "[:0], "a a a a a b"]}), "web"),
        entry(written(tmp_path / "texts", {"y": texts})),
    ]
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    dry = dry_run(Clean(), inputs, 100, reader)
    assert sorted(tmp_path.rglob("*")) == before
    assert dry.sampled == {"pages": (2, 2), "texts": (10, 10)}  # datatrove's reader skips the empty text
    extract, quality = dry.steps
    assert (extract.name, extract.documents_in, extract.documents_out, extract.trials) == ("extract", 2, 2, [])
    assert calls.count("extract") == 2 and "other values are not tried" in extract.note
    assert (quality.documents_in, quality.documents_out, dry.kept) == (12, 8, 8)
    assert {reason: count for reason, (count, _) in quality.reasons.items()} == {"too_short": 3, "too_many_a": 1}
    assert quality.reasons["too_many_a"][1] == "x/2: a a a a a b more"
    trials = {trial.key: trial for trial in quality.trials}
    assert list(trials) == ["min_words", "shares.a"] and trials["min_words"].setting == 4
    # of 12: all but the a's and texts of one word; ... ; of 4 words on; of 5; of 6; of 8
    expected = {2: 10, 3: 9, 4: 8, 5: 6, 6: 5, 8: 3}
    assert trials["min_words"].shares == {value: pytest.approx(count / 12) for value, count in expected.items()}
    # 5 of 7 words are a: 0.714
    expected = {0.25: 8, 0.375: 8, 0.5: 8, 0.625: 8, 0.75: 9, 1.0: 9}
    assert trials["shares.a"].shares == {value: pytest.approx(count / 12) for value, count in expected.items()}


def test_a_step_that_cannot_be_made_is_left_out_with_a_note(tmp_path: Path) -> None:
    inputs = [entry(written(tmp_path / "texts", {"y": ["b b b b"] * 3}))]
    dry = dry_run(Clean(classifier=Words()), inputs, 10, reader)
    assert [(s.name, s.documents_in, s.documents_out, s.note) for s in dry.steps] == [
        ("quality", 3, 3, ""),
        ("classifier", 3, 3, "not run: not trained yet"),
    ]
    assert dry.kept == 3


def test_other_values_have_a_limit_of_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TRIED_S", 0.0)
    dry = dry_run(Clean(), [entry(written(tmp_path / "texts", {"y": ["b b b b"] * 3}))], 10, reader)
    assert dry.steps[0].trials == [] and dry.steps[0].note.endswith("not from min_words on")
    assert calls == ["quality"] * 3


def test_the_sample_is_spread_over_the_files(tmp_path: Path) -> None:
    folder = written(tmp_path / "many", {f"{i:02d}": [f"{i} {j}" for j in range(50)] for i in range(64)})
    drawn = sample(reader(entry(folder)), 96)
    assert drawn.seen == 960 and len(drawn.kept) == 96  # ten times as many are looked at
    firsts = {text.split()[0] for text in (d.text for d in drawn.kept)}
    assert len(firsts) >= 28  # of the files of 32 parts; a sample of a tenth leaves out one or two
    assert max(int(d.text.split()[1]) for d in drawn.kept) > 20  # not only the first rows
    again = sample(reader(entry(folder)), 96)
    assert [d.id for d in again.kept] == [d.id for d in drawn.kept]


class Endless:
    """A reader whose documents do not end."""

    def __init__(self) -> None:
        self.taken = 0

    def run(self, data: Any, rank: int, world_size: int) -> Iterator[Document]:
        while True:
            self.taken += 1
            yield Document("b", "x")


def test_an_endless_reader_is_left() -> None:
    endless = Endless()
    assert len(sample(endless, 7).kept) == 7 and endless.taken == 70


def test_numbers_of_a_section() -> None:
    content = {"a": 1, "flag": True, "b": {"en": 0.5}, "c": [0.1, {"d": 2}], "x_s": 3.0, "seed": 4, "t": "5", "n": None}
    assert list(numbers(content)) == [(("a",), 1), (("b", "en"), 0.5), (("c", 0), 0.1), (("c", 1, "d"), 2)]
    assert replaced(content, ("c", 1, "d"), 9)["c"] == [0.1, {"d": 9}] and content["c"][1] == {"d": 2}


def test_values_around_a_setting() -> None:
    def values(settings: Words, *key: str) -> list[float]:
        content: Any = settings.model_dump()
        for part in key:
            content = content[part]
        return [value for value, _ in others(settings, key, content)]

    assert values(Words(shares={"a": 0.8}), "shares", "a") == [0.4, pytest.approx(0.6), 1.0]  # none above 1
    assert values(Words(shares={"a": 0.0}), "shares", "a") == [0.01, 0.05, 0.1, 1]
    assert values(Words(min_words=1), "min_words") == [0, 2]
    assert values(Words(min_words=0), "min_words") == [1, 5, 10]
    ((value, other), *_) = others(Words(), ("min_words",), 4)
    assert (value, other.min_words, other.shares) == (2, 2, {"a": 0.5})


def printed(dry: DryRun) -> str:
    console = Console(file=io.StringIO(), width=120, color_system=None)
    console.print(shown(dry))
    return console.file.getvalue()


def test_what_is_printed(tmp_path: Path) -> None:
    nasty = "[bold red]x[/bold red] \x1b[31m \x00 \u202e"
    dry = dry_run(Clean(), [entry(written(tmp_path / "texts", {"y": [nasty, "b b b b b", "b b b b"]}))], 10, reader)
    text = printed(dry)
    assert "texts: a sample of 3 of the 3 documents looked at" in text
    assert "quality: 3 of 3 kept" in text and "too_short" not in text
    assert "\nother values keep the same number of documents: shares.a\n" in text
    assert "2: 100.0%   3: 100.0%   4*: 100.0%   5: 66.7%   6: 33.3%   8: 0.0%" in text and text.endswith(
        "kept: 3 of 3\n"
    )
    text = printed(dry_run(Clean(quality=Words(min_words=9)), [entry(tmp_path / "texts")], 10, reader))
    assert "too_short  3          y/0: [bold red]x[/bold red] \\u001b[31m \\u0000 \\u202e" in text
    assert not set(text) & {"\x1b", "\x00", "\u202e"}
