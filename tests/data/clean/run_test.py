"""Cleaning as a part of `llmtrain data`: done once, gone on with, and never mixed with other settings."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("datatrove")

from llmtrain.config.clean import CleanConfig, CollectConfig
from llmtrain.config.data import DataConfig, SourceConfig, TaskConfig
from llmtrain.config.schema import TokenizerConfig
from llmtrain.data.clean.held_out_text import holding_out
from llmtrain.data.clean.run import check_held_out, clean, clean_dir
from llmtrain.data.prepare import prepare, with_paths
from llmtrain.data.shards import read_manifest, split_documents
from llmtrain.observe.locks import making
from tests.conftest import ROOT

OFF = dict.fromkeys(("repair", "repetition", "quality", "c4", "fineweb"))
TEXT = "It is a truth that {} is known to all who have seen the sea and the ships that sail on it every day."


def section(tmp_path: Path, **keys: object) -> DataConfig:
    """A section with one input of rows, one of which holds a held-out problem and one a mail address."""
    rows = tmp_path / "rows.jsonl"
    if not rows.exists():
        texts = [TEXT.format(word) for word in ("salt", "sand", "wind", "salt")] + ["Write to anna@example.com or not."]
        rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    collect = [CollectConfig(name="rows", type="jsonl", path=str(rows))]
    sources = [SourceConfig(name="rows", type="cleaned", held_out=0.0)]
    return DataConfig(**{"collect": collect, "clean": CleanConfig(**OFF), "sources": sources} | keys)


def texts(root: Path) -> list[str]:
    import zstandard

    found = []
    for path in sorted((root / "documents").rglob("*.zst")):
        with zstandard.open(path, "rt", encoding="utf-8") as lines:
            found += [json.loads(line)["text"] for line in lines]
    return found


def test_from_rows_to_tokens(tmp_path: Path) -> None:
    data, place = section(tmp_path), tmp_path / "data"
    prepare(data, TokenizerConfig(vocab_size=300), str(place), str(tmp_path / "tokenizer"), 0)
    left = texts(place / "clean")
    assert left == [*(TEXT.format(word) for word in ("salt", "sand", "wind")), "Write to <EMAIL> or not."]
    assert read_manifest(str(place))["sources"]["rows"]["train"]["documents"] == 4
    assert "anna" not in (place / "clean/report/index.html").read_text(), "no personal data in the report"
    before = (place / "clean/report/index.html").stat().st_mtime_ns
    prepare(data, TokenizerConfig(vocab_size=300), str(place), str(tmp_path / "tokenizer"), 0)
    assert (place / "clean/report/index.html").stat().st_mtime_ns == before


def test_what_is_no_document_is_an_example_of_the_report(tmp_path: Path) -> None:
    data = section(tmp_path)
    with open(tmp_path / "rows.jsonl", "a") as rows:
        rows.write('{"text": 5}\n{"text": "the last of these rows has no end\n')
    clean(data, str(tmp_path / "data"), 0)
    page = (tmp_path / "data/clean/report/index.html").read_text()
    assert "rows.jsonl#6" in page and "not_text" in page and "json_broken" in page


def test_personal_data_of_dropped_documents_is_not_on_the_page(tmp_path: Path) -> None:
    data = section(tmp_path, clean=CleanConfig(**OFF | {"quality": {"min_words": 10}}))
    clean(data, str(tmp_path / "data"), 0)
    page = (tmp_path / "data/clean/report/index.html").read_text()
    assert "Write to &lt;EMAIL&gt; or not." in page and "anna" not in page
    assert "gopher_short_doc" in page


def test_without_inputs_nothing_is_made(tmp_path: Path) -> None:
    clean(DataConfig(), str(tmp_path / "data"), 0)
    assert not (tmp_path / "data").exists()


def test_held_out_problems_of_the_same_document_are_found(tmp_path: Path) -> None:
    task = TaskConfig(name="sums", type="chain_sum", train=20, held_out=3)
    probe = section(tmp_path, tasks=[task])
    clean(probe, str(tmp_path / "probe"), 0)
    problem = json.loads((tmp_path / "probe/clean/evaluation/sums-held_out.jsonl").read_text().splitlines()[0])
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": TEXT.format("salt") + problem["prompt"]}) + "\n")
    own = section(tmp_path, tasks=[task], held_out=str(tmp_path / "data/sums-held_out.jsonl"))
    clean(own, str(tmp_path / "data"), 0)
    held = json.loads((tmp_path / "data/clean/job.json").read_text())["clean"]["contamination"]["sets"]
    assert held == {"task-sums": str(tmp_path / "data/clean/evaluation/sums-held_out.jsonl")}


def test_an_n_of_a_set_that_is_not_there_is_refused(tmp_path: Path) -> None:
    contamination = {"sets": {"own": str(tmp_path / "rows.jsonl")}, "n_by_set": {"own": 5, "owm": 5}}
    with pytest.raises(ValueError, match=r"n_by_set\.owm: is no set, those are own; correct it"):
        clean(section(tmp_path, clean=CleanConfig(**OFF, contamination=contamination)), str(tmp_path / "data"), 0)


def test_what_is_refused_touches_nothing(tmp_path: Path) -> None:
    """Nor does it read the sources to say so."""
    task, place = TaskConfig(name="sums", type="chain_sum", train=20, held_out=3), str(tmp_path / "data")
    clean(section(tmp_path, tasks=[task]), place, 0)
    files = {path: path.read_bytes() for path in (tmp_path / "data/clean").rglob("*") if path.is_file()}
    gone = SourceConfig(name="books", type="jsonl", path=str(tmp_path / "gone.jsonl"))
    for other, seed in ((section(tmp_path, tasks=[task]), 1), (section(tmp_path, tasks=[task], sources=[gone]), 0)):
        with pytest.raises(ValueError, match=r"clean was cleaned with other settings of .* or by an earlier version"):
            clean(other, place, seed)
    assert files == {path: path.read_bytes() for path in files}


@pytest.mark.parametrize("split", ["", ":train"])
def test_other_problems_are_seen_when_all_is_cleaned(tmp_path: Path, split: str) -> None:
    (tmp_path / "asked").mkdir()
    for name in ("train", "test"):
        (tmp_path / "asked" / f"{name}.jsonl").write_text('{"prompt": "How salt is the sea?", "answer": "Very."}\n')
    path = str(tmp_path / "asked" / ("train.jsonl" if not split else "")).rstrip("/")
    data, place = section(tmp_path, held_out=path + split), str(tmp_path / "data")
    clean(data, place, 0)
    check_held_out(data, place)
    check_held_out(section(tmp_path), place)
    others = [path.replace("train", "test") + split.replace("train", "test")] if split else []
    (tmp_path / "more.jsonl").write_text('{"prompt": "How wide is the sea?", "answer": "Very."}\n')
    for other in (*others, str(tmp_path / "more.jsonl")):
        with pytest.raises(ValueError, match="was cleaned before it had these problems; give another"):
            check_held_out(section(tmp_path, held_out=other), place)
    (tmp_path / "asked/train.jsonl").write_text('{"prompt": "How deep is the sea?", "answer": "Very."}\n')
    with pytest.raises(ValueError, match="was cleaned before"):
        check_held_out(data, place)


def books(tmp_path: Path, **keys: object) -> tuple[DataConfig, list[str]]:
    """A section that also has a source of four texts, two of them held out; and which these are. The rows hold what
    the books say, each behind a sentence of its own."""
    lines = [" ".join(f"{letter}{i}" for i in range(20)) for letter in "abcd"]
    (tmp_path / "books.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    pages = [f"{TEXT.format(line[:2])} {line}" for line in lines]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": page}) + "\n" for page in pages))
    source = SourceConfig(name="books", type="jsonl", path=str(tmp_path / "books.jsonl"), held_out=0.5)
    own = section(tmp_path, **{"clean": CleanConfig(**OFF, dedup=None)} | keys)
    held = [text for split, text in split_documents(source, 0) if split == "held_out"]
    return own.model_copy(update={"sources": [*own.sources, source]}), held


def test_pages_that_hold_held_out_text_of_another_source_are_dropped(tmp_path: Path) -> None:
    data, held = books(tmp_path)
    clean(with_paths(data, str(tmp_path / "data")), str(tmp_path / "data"), 0)
    left = texts(tmp_path / "data/clean")
    assert len(held) == 2 and len(left) == 2 and not any(text in page for text in held for page in left)
    report = json.loads((tmp_path / "data/clean/report/report.json").read_text())
    assert next(s["dropped"] for s in report["steps"] if s["step"] == "contamination") == {"contaminated": 2}
    off, _ = books(tmp_path, clean=CleanConfig(**OFF, dedup=None, contamination={"text_ngrams": 0}))
    clean(off, str(tmp_path / "off"), 0)
    assert len(texts(tmp_path / "off/clean")) == 4


def test_other_held_out_text_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # wherever the sources lie
    data, _ = books(tmp_path)
    clean(data, str(tmp_path / "data"), 0)
    sources = [data.sources[0], data.sources[1].model_copy(update={"held_out": 0.3})]
    with pytest.raises(ValueError, match=r"other settings of data\.collect"):
        clean(data.model_copy(update={"sources": sources}), str(tmp_path / "data"), 0)
    lines = [json.dumps({"text": " ".join(f"{letter}{i}" for i in range(20))}) for letter in "efgh"]
    (tmp_path / "books.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"other contents of data\.clean\.contamination\.sets\.text-books"):
        clean(data, str(tmp_path / "data"), 0)


def test_only_text_that_is_there_before_cleaning_is_looked_up(tmp_path: Path) -> None:
    """What this job cleans is held out later; documents that another job cleaned are as any others."""
    own, root = SourceConfig(name="a", type="cleaned"), str(tmp_path / "clean")
    sources = [
        own,
        own.model_copy(update={"path": f"{root}/documents/a"}),
        own.model_copy(update={"path": f"{root}-2/documents/a"}),
        SourceConfig(name="c", type="text", path=f"{root}/documents"),
        SourceConfig(name="d", type="text", path=str(tmp_path), held_out=0.0),
        SourceConfig(name="e", type="topics"),
    ]
    assert holding_out(sources, root) == [sources[2], sources[5]]


@pytest.mark.parametrize("change", ["clean", "execution", "rows"])
def test_other_settings_or_contents_are_refused(tmp_path: Path, change: str) -> None:
    data = section(tmp_path)
    clean(data, str(tmp_path / "data"), 0)
    other = {
        "clean": lambda: section(tmp_path, clean=CleanConfig(**OFF, pii=None)),
        "execution": lambda: section(tmp_path, execution={"tasks": 2}),
        "rows": lambda: (tmp_path / "rows.jsonl").write_text('{"text": "new"}\n') and data,
    }[change]()
    told = "other contents of rows" if change == "rows" else "other settings of data.collect"
    for marker in ("cleaned.json", "begun.json"):  # also where it was only begun
        with pytest.raises(ValueError, match=told) as error:
            clean(other, str(tmp_path / "data"), 0)
        assert "or delete" in str(error.value)
        (tmp_path / "data/clean" / marker).unlink()
    assert len(texts(tmp_path / "data/clean")) == 4, "nothing was touched"


def test_new_files_are_seen_when_the_shards_are_there(tmp_path: Path) -> None:
    data, places = section(tmp_path), (str(tmp_path / "data"), str(tmp_path / "tokenizer"))
    prepare(data, TokenizerConfig(vocab_size=300), *places, 0)
    (tmp_path / "rows.jsonl").write_text('{"text": "new"}\n')
    with pytest.raises(ValueError, match="was cleaned from other contents of rows; give another"):
        prepare(data, TokenizerConfig(vocab_size=300), *places, 0)
    (tmp_path / "rows.jsonl").unlink()  # raw documents may go when they are cleaned
    prepare(data, TokenizerConfig(vocab_size=300), *places, 0)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    inputs = [CollectConfig(name="rows", type="jsonl", path=str(folder))]
    data, places = section(tmp_path, collect=inputs), (str(tmp_path / "data2"), str(tmp_path / "tokenizer2"))
    prepare(data, TokenizerConfig(vocab_size=300), *places, 0)
    (folder / "a.jsonl").unlink()
    prepare(data, TokenizerConfig(vocab_size=300), *places, 0)


def test_other_word_lists_are_seen(tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/en").write_text("salt\n")
    toxicity = {"toxicity": {"word_lists": str(tmp_path / "lists")}, "language": {}}
    data, places = section(tmp_path, clean=CleanConfig(**OFF | toxicity)), (str(tmp_path / "data"), str(tmp_path / "t"))
    prepare(data, TokenizerConfig(vocab_size=300), *places, 0)
    assert [("salt" in text) for text in texts(tmp_path / "data/clean")] == [False] * 3
    (tmp_path / "lists/en").write_text("sand\n")
    for call in (lambda: prepare(data, TokenizerConfig(vocab_size=300), *places, 0), lambda: clean(data, places[0], 0)):
        with pytest.raises(ValueError, match=r"other contents of data\.clean\.toxicity\.word_lists"):
            call()


def test_two_jobs_do_not_clean_into_one_directory(tmp_path: Path) -> None:
    place = tmp_path / "there"
    data = section(tmp_path, clean=CleanConfig(**OFF, path=str(place)))
    clean(data, str(tmp_path / "data"), 0)
    (place / "cleaned.json").unlink()
    with making(str(place / "cleaned.json")), pytest.raises(ValueError, match="another job is at work there"):
        clean(data, str(tmp_path / "other"), 0)


def test_text_of_archives_is_no_html(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": TEXT.format("salt")}) + "\n")
    held = []
    for name, keys in (("text", {}), ("html", {"html": True})):
        inputs = [CollectConfig(name="rows", type="jsonl", path=str(rows), kind="web", **keys)]
        clean(section(tmp_path, collect=inputs), str(tmp_path / name), 0)
        held.append(texts(tmp_path / name / "clean"))
    assert held[0] == [TEXT.format("salt")] and held[1] != held[0]


def test_an_input_of_which_nothing_is_left(tmp_path: Path) -> None:
    data = section(tmp_path, clean=CleanConfig(**OFF | {"quality": {"min_words": 5000}}))
    with pytest.raises(ValueError, match=r"'rows': cleaning left no document of it, .*index\.html says why; remove"):
        prepare(data, TokenizerConfig(vocab_size=300), str(tmp_path / "data"), str(tmp_path / "tokenizer"), 0)


def test_languages_that_cannot_be_split_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmtrain.data.clean import words

    monkeypatch.setattr(words, "by_language", lambda code, settings: None if code == "th" else "splitter")
    keep = {"language": {"keep": ["en", "th"]}, "quality": {"min_words": 3}}
    with pytest.raises(ValueError, match="keep: th: its word splitter is not installed"):
        clean(section(tmp_path, clean=CleanConfig(**OFF | keep)), str(tmp_path / "data"), 0)
    clean(section(tmp_path, clean=CleanConfig(**OFF, language={"keep": ["th"]})), str(tmp_path / "other"), 0)


def test_a_directory_of_others_is_left_alone(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs/documents/rows"
    theirs.mkdir(parents=True)
    (theirs / "00000.jsonl.zst").write_text("mine")
    with pytest.raises(ValueError, match="holds files that cleaning did not write"):
        clean(section(tmp_path, clean=CleanConfig(**OFF, path=str(tmp_path / "theirs"))), str(tmp_path / "data"), 0)
    assert [p.name for p in (tmp_path / "theirs").rglob("*")] == ["documents", "rows", "00000.jsonl.zst"]
    for place, told in (("rows.jsonl", "is no directory"), ("rows.jsonl/clean", "cannot be made: Not a directory")):
        with pytest.raises(ValueError, match=told):
            clean(section(tmp_path, clean=CleanConfig(**OFF, path=str(tmp_path / place))), str(tmp_path / "data"), 0)


def test_what_the_report_shows_may_change(tmp_path: Path) -> None:
    clean(section(tmp_path), str(tmp_path / "data"), 0)
    clean(section(tmp_path, clean=CleanConfig(**OFF, examples=3)), str(tmp_path / "data"), 0)
    elsewhere = section(tmp_path, clean=CleanConfig(**OFF, path=str(tmp_path / "there")))
    assert clean_dir(elsewhere, "data") == str(tmp_path / "there")
    clean(elsewhere, str(tmp_path / "data"), 0)
    assert len(texts(tmp_path / "there")) == 4


def test_broken_word_lists_are_told_before_any_task(tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    data = section(tmp_path, clean=CleanConfig(**OFF, toxicity={"word_lists": str(tmp_path / "lists")}))
    with pytest.raises(ValueError, match="word_lists"):
        clean(data, str(tmp_path / "data"), 0)
    assert not (tmp_path / "data/clean/logs").exists()
    (tmp_path / "lists/en").write_text("salt\n")
    clean(data, str(tmp_path / "data"), 0)  # the same directory takes what was corrected


@pytest.mark.parametrize("place", [None, "elsewhere"])
def test_the_report_says_how_many_seeds_the_classifier_keeps(tmp_path: Path, place: str | None) -> None:
    settings: dict[str, object] = {"held_out": 0.3, "buckets": 4096, "path": place and str(tmp_path / place)}
    for kind in ("good", "bad"):
        lines = [json.dumps({"text": f"{kind} {n} " + TEXT.format(kind)}) for n in range(60)]
        settings[kind] = str(tmp_path / f"{kind}.jsonl")
        (tmp_path / f"{kind}.jsonl").write_text("\n".join(lines))
    clean(section(tmp_path, clean=CleanConfig(**OFF, language=None, classifier=settings)), str(tmp_path / "data"), 0)
    found = json.loads((tmp_path / "data/clean/report/report.json").read_text())["classifier"]
    assert (found["auc"], found["kept_share.good"], found["kept_share.bad"], found["threshold"]) == (1.0, 1.0, 0.0, 0.5)


@pytest.mark.timeout(120)
def test_the_command(tmp_path: Path) -> None:
    """--dry-run writes nothing; a missing file is one line and exit status 2."""
    document = tmp_path / "d.yaml"
    section(tmp_path)
    document.write_text(
        f"run_dir: {tmp_path}/run\ntokenizer: {{vocab_size: 300}}\ndata:\n  collect: [{{name: rows, type: jsonl, path: "
        f"{tmp_path}/rows.jsonl}}]\n  sources: [{{name: rows, type: cleaned}}]\n"
    )
    command = [sys.executable, "-m", "llmtrain", "data", str(document)]
    dry = subprocess.run([*command, "--dry-run"], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert dry.returncode == 0, dry.stderr
    assert "min_words" in dry.stdout and "a sample of 5 of the 5 documents" in dry.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.yaml", "rows.jsonl"]
    missing = [*command, f"data.collect.rows.path={tmp_path}/none.jsonl"]
    told = subprocess.run(missing, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert told.returncode == 2 and len(told.stderr.splitlines()) == 1 and "none.jsonl" in told.stderr
