"""Rows from files of every form, and what is said of those that are broken."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from llmtrain.data import files
from llmtrain.data.faults import Faults
from llmtrain.data.files import read_rows

ROWS = [{"prompt": "1 é", "answer": "2"}, {"prompt": 'a\nb, "c"', "answer": "\u2028x"}, {"prompt": "3", "answer": ""}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def read(path: Path | str) -> list[dict]:
    faults = Faults(str(path))
    rows = [row for _, row in read_rows(str(path), faults)]
    faults.raise_any()
    return rows


def places(path: Path) -> list[str]:
    return [where.removeprefix(f"{path}:") for where, _ in read_rows(str(path), Faults(""))]


def csv_text(delimiter: str) -> str:
    values = [["prompt", "answer"], *(row.values() for row in ROWS)]
    return "".join(delimiter.join('"' + v.replace('"', '""') + '"' for v in row) + "\r\n" for row in values)


def parquet(path: Path, rows: list[dict]) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def dataset(folder: Path, rows: list[dict]) -> datasets.Dataset:
    """Returns a data set as the hub gives it: mapped from files."""
    folder.mkdir(exist_ok=True)
    parquet(folder / "rows.parquet", rows)
    return datasets.Dataset.from_parquet(str(folder / "rows.parquet"), cache_dir=str(folder))


WRITERS: dict[str, Callable[[Path], object]] = {
    "x.jsonl": lambda path: path.write_bytes(LINES),
    "bom.jsonl": lambda path: path.write_bytes(b"\xef\xbb\xbf" + LINES),
    "crlf.jsonl": lambda path: path.write_bytes(LINES.replace(b"\n", b"\r\n")),
    "cr.jsonl": lambda path: path.write_bytes(LINES.replace(b"\n", b"\r")),
    "blank.ndjson": lambda path: path.write_bytes(b"\n" + LINES.replace(b"\n", b"\n \n")),
    "no_end.txt": lambda path: path.write_bytes(LINES.rstrip()),
    "lines.json": lambda path: path.write_bytes(LINES),
    "array.json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "bom_array.json": lambda path: path.write_text("\ufeff" + json.dumps(ROWS)),
    "x.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES[:40]) + gzip.compress(LINES[40:])),
    "x.jsonl.zst": lambda path: path.write_bytes(
        zstandard.compress(LINES[:40]) + zstandard.ZstdCompressor(write_content_size=False).compress(LINES[40:])
    ),
    "hidden": lambda path: path.write_bytes(gzip.compress(json.dumps(ROWS).encode())),
    "x.csv": lambda path: path.write_text(csv_text(","), newline=""),
    "x.csv.gz": lambda path: path.write_bytes(gzip.compress(csv_text(",").encode())),
    "x.tsv": lambda path: path.write_text("\ufeff" + csv_text("\t"), newline=""),
    "x.parquet": lambda path: parquet(path, ROWS),
    "saved": lambda path: dataset(path.parent / "made", ROWS).save_to_disk(path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_form_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    assert read(tmp_path / name) == ROWS


def test_places_are_lines_or_rows(tmp_path: Path) -> None:
    for name in ("blank.ndjson", "array.json", "x.csv", "x.parquet"):
        WRITERS[name](tmp_path / name)
    assert places(tmp_path / "blank.ndjson") == ["2", "4", "6"]
    assert places(tmp_path / "array.json") == ["2", "6", "10"]
    assert places(tmp_path / "x.csv") == ["2", "3", "5"]  # the second row has two lines
    assert places(tmp_path / "x.parquet") == ["1", "2", "3"]


def test_a_null_in_a_table_is_no_field(tmp_path: Path) -> None:
    parquet(tmp_path / "x.parquet", [{"prompt": "a", "answer": None}, {"prompt": None, "answer": "b"}])
    assert read(tmp_path / "x.parquet") == [{"prompt": "a"}, {"answer": "b"}]


def test_directories_and_globs(tmp_path: Path) -> None:
    (tmp_path / "d" / "deep").mkdir(parents=True)
    for i, name in enumerate(("b.jsonl", "a.jsonl", "deep/c.json")):
        (tmp_path / "d" / name).write_text(json.dumps({"prompt": str(i)}))
    (tmp_path / "d" / "README.md").write_text("not rows")
    assert [row["prompt"] for row in read(tmp_path / "d")] == ["1", "0", "2"]
    assert [row["prompt"] for row in read(tmp_path / "d" / "*.jsonl")] == ["1", "0"]
    (tmp_path / "d" / ".ipynb_checkpoints").mkdir()
    for name in (".hidden.jsonl", "._a.jsonl", "deep/.c.json", ".ipynb_checkpoints/a.jsonl"):
        (tmp_path / "d" / name).write_text(json.dumps({"prompt": name}))
    assert [row["prompt"] for row in read(tmp_path / "d")] == ["1", "0", "2"]
    (tmp_path / "d").rename(tmp_path / ".d")  # what is named is meant
    assert [row["prompt"] for row in read(tmp_path / ".d")] == ["1", "0", "2"]
    assert read(tmp_path / ".d" / ".hidden.jsonl") == [{"prompt": ".hidden.jsonl"}]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: no file of rows in this directory; it needs one of .jsonl"):
        read(tmp_path / "empty")


def test_a_file_whose_name_reads_as_a_glob_is_that_file(tmp_path: Path) -> None:
    name = str(tmp_path / "sp ace [1]*.jsonl")
    for path, prompt in ((name, "named"), (str(tmp_path / "sp ace 1x.jsonl"), "matched")):
        Path(path).write_text(json.dumps({"prompt": prompt}))
    assert read(name) == [{"prompt": "named"}]
    os.remove(name)
    assert read(name) == [{"prompt": "matched"}]


def test_a_directory_of_several_splits_needs_one_named(tmp_path: Path) -> None:
    for i, name in enumerate(("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001")):
        parquet(tmp_path / f"{name}.parquet", [{"prompt": str(i)}])
    with pytest.raises(ValueError, match=r"has several splits; give one of them .*:SPLIT: test, train"):
        read(tmp_path)
    assert [row["prompt"] for row in read(f"{tmp_path}:train")] == ["0", "1"]
    assert [row["prompt"] for row in read(f"{tmp_path}:test")] == ["2"]
    with pytest.raises(ValueError, match=r"has no split 'dev'; give one of them"):
        read(f"{tmp_path}:dev")


def test_a_saved_dictionary_of_data_sets_needs_a_split(tmp_path: Path) -> None:
    both = {split: dataset(tmp_path / split, [{"prompt": split}]) for split in ("train", "test")}
    datasets.DatasetDict(both).save_to_disk(tmp_path / "saved")
    assert read(f"{tmp_path}/saved:test") == [{"prompt": "test"}]
    with pytest.raises(ValueError, match=r"saved: has several splits; give one"):
        read(tmp_path / "saved")


def test_the_hub_is_asked_for_a_name_and_its_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, both = [], {split: dataset(tmp_path / split, [{"prompt": split}]) for split in ("train", "test")}

    def load(name: str, configuration: str | None) -> datasets.DatasetDict:
        asked.append((name, configuration))
        return datasets.DatasetDict(both)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read("openai/gsm8k:main:test") == [{"prompt": "test"}] and read("x/y.z:train") == [{"prompt": "train"}]
    assert asked == [("openai/gsm8k", "main"), ("x/y.z", None)]
    with pytest.raises(ValueError, match="x/y: has several splits"):
        read("x/y")


def test_without_the_hub_it_is_said_what_was_tried() -> None:
    assert os.environ.get("HF_HUB_OFFLINE") == "1"
    with pytest.raises(ValueError, match=r"no/such: no such file, and as a data set .* cannot be .*HF_HUB_OFFLINE"):
        read("no/such:train")
    with pytest.raises(ValueError, match=r"no/such.jsonl: no such file; give the path of a file of rows, or"):
        read("no/such.jsonl")


BROKEN: dict[str, tuple[bytes, str]] = {
    "json.jsonl": (LINES + b'{"prompt": \n', r"json.jsonl:4: not valid JSON \(Expecting value\): '{\"prompt\":'; fix"),
    "list.jsonl": (b'{"a": 1}\n[1]\n', r"list.jsonl:2: expected a JSON object, found list"),
    "nul.jsonl": (b'{"a": "x\x00"}\n', r"nul.jsonl:1: not valid JSON \(Invalid control character"),
    "latin.jsonl": ('{"a": "é"}\n'.encode("latin-1"), r"latin.jsonl:1: not UTF-8 text \(byte 7\); convert"),
    "wide.jsonl": ('{"a": 1}\n'.encode("utf-16"), r"wide.jsonl:1: not UTF-8 text but UTF-16; convert it with `iconv"),
    "wide32.jsonl": (
        b"\xff\xfe\0\0" + '{"a": 1}\n'.encode("utf-32-le"),
        r"wide32.jsonl:1: not UTF-8 text but UTF-32; convert it with `iconv -f utf-32 -t utf-8`",
    ),
    "wide32_big.jsonl": (
        b"\0\0\xfe\xff" + '{"a": 1}\n'.encode("utf-32-be"),
        r"wide32_big.jsonl:1: not UTF-8 text but UTF-32; convert it with `iconv -f utf-32",
    ),
    "half.jsonl": (b'{"a": 1}\n{"a": ["\\ud83d"]}\n', r"half.jsonl:2: field 'a' has half a character \(\\ud83d"),
    "key.jsonl": (b'{"\\udc00": 1}\n', r"key.jsonl:1: field '\\udc00' has half a character"),
    "twice.jsonl": (b'{"a": 1, "b": {"c": 1, "c": 2}}\n', r"twice.jsonl:1: key 'c' is written twice; remove one"),
    "deep.jsonl": (b'{"a": ' + b"[" * 100_000 + b"\n", r"deep.jsonl:1: JSON that is nested too deeply"),
    "digits.jsonl": (b'{"a": ' + b"7" * 5000 + b"}\n", r"digits.jsonl:1: Exceeds the limit \(4300 digits\)"),
    "long.jsonl": (
        b'{"a": "' + b"x" * 10**6 + b"\n",
        r"long.jsonl:1: not valid JSON .*: '{\"a\": \"x{53}'; fix",
    ),
    "cut.json": (b'[{"a": 1},\n{"a": 2}', r"cut.json:2: the array is cut short or lacks a comma"),
    "comma.json": (b'[{"a": 1}\n\n{"a": 2}]', r"comma.json:3: the array is cut short or lacks a comma"),
    "more.json": (b'[{"a": 1}]\n[]', r"more.json:1: there is more behind the end of the array"),
    "bad.json": (b'[\n{"a": 1},\n{"a": }]', r"bad.json:3: not valid JSON"),
    "number.json": (b'[{"a": 1},\n7]', r"number.json:2: expected a JSON object, found int"),
    "latin.json": ('[{"a": 1},\n{"a": "é"}]'.encode("latin-1"), r"latin.json:2: not UTF-8 text"),
    "x.gz": (gzip.compress(LINES)[:-9], r"x.gz: not a whole .gz file"),
    "no.jsonl.gz": (LINES, r"no.jsonl.gz: not a whole .gz file"),
    "x.zst": (zstandard.compress(LINES * 99)[:-9], r"x.zst: not a whole .zst file"),
    "no.zst": (LINES, r"no.zst: not a whole .zst file"),
    "x.parquet": (b"PAR1 nothing", r"x.parquet: cannot be read as Parquet"),
    "few.csv": (b"a,b\n1,2\n3\n", r"few.csv:3: 1 values for the 2 fields"),
    "quote.csv": (b'a,b\n1,"2\n', r"quote.csv:2: not valid CSV"),
    "named.csv": (b"a,a\n1,2\n", r"named.csv:1: a field is named twice"),
    "latin.csv": ("a\né\n".encode("latin-1"), r"latin.csv:2: not UTF-8 text"),
    "empty.jsonl": (b"", r"empty.jsonl: the file is empty"),
    "spaces.json": (b" \n\t\n", r"spaces.json: the file is empty"),
    "none.json": (b"[]", r"none.json: the file is empty"),
    "head.csv": (b"a,b\n", r"head.csv: the file is empty"),
    "binary.jsonl": (bytes(range(256)) * 40, r"binary.jsonl:1: not (UTF-8|valid JSON)"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_told_by_file_and_line(name: str, tmp_path: Path) -> None:
    content, message = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path / name)
    assert str(error.value).startswith(str(tmp_path / name))


def test_all_faults_are_told_at_once_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join("{" if i % 2 else '{"a": 1}' for i in range(100)))
    with pytest.raises(ValueError) as error:
        read(path)
    lines = str(error.value).splitlines()
    assert [line.split(": ")[0] for line in lines[:-1]] == [f"{path}:{2 * i + 2}" for i in range(20)]
    assert lines[-1] == f"{path}: 50 faults, of which the first 20 are shown"


def test_what_is_no_file_or_closed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"pipe: not a file"):
        read(tmp_path / "pipe")
    (tmp_path / "x.jsonl").write_text("{}")

    def closed(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files.Path, "read_bytes", closed)
    with pytest.raises(ValueError, match=r"x.jsonl: cannot be read: Permission denied"):
        read(tmp_path / "x.jsonl")


def test_a_link_to_nothing_is_told(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").symlink_to("gone.jsonl")
    for path in ("x.jsonl", "*.jsonl"):
        with pytest.raises(ValueError, match=r"x.jsonl: is a link to gone.jsonl, which is not there; mend the link"):
            read(tmp_path / path)


def test_a_colon_in_a_name_is_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "a:b.jsonl").write_text('{"a": 1}')
    assert read(tmp_path / "a:b.jsonl") == [{"a": 1}]
