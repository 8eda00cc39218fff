"""Files that are broken, endless or mean: each costs a counted reason, and what stands beside it is read."""

from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import sys
import time
import tracemalloc
import zlib
from pathlib import Path

import pytest

pytest.importorskip("datatrove")
pytest.importorskip("pypdf")

import pyarrow
import pyarrow.parquet

from llmtrain.data.clean.read.text import charset
from tests.data.clean.members import (
    COMPRESSIONS,
    TEXTS,
    assembled,
    collected,
    dropped,
    page,
    parquet,
    pdf,
    record,
    response,
)

ROOT = Path(__file__).parents[3]
ROW = b'{"text": "next"}\n'


def outcome(type_: str, path: Path, data: bytes | None = None, **keys: object) -> tuple[list[str], dict[str, int]]:
    """Returns the texts and the counted reasons of an input, written first."""
    if data is not None:
        path.write_bytes(data)
    documents, counts, examples = collected(type_, path, **keys)
    assert len(examples) == sum(dropped(counts).values())
    return [document.text for document in documents], dropped(counts)


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_cut_file_keeps_the_rows_before_the_cut(ending: str, tmp_path: Path) -> None:
    draw = random.Random(0)
    lines = b"".join(b'{"text": "%d %s"}\n' % (i, draw.randbytes(20).hex().encode()) for i in range(20_000))
    packed = COMPRESSIONS[ending](lines)
    texts, reasons = outcome("jsonl", tmp_path / f"a.jsonl{ending}", packed[: len(packed) // 2])
    assert 5_000 < len(texts) < 15_000 and texts[0].startswith("0 ") and texts[-1].startswith(f"{len(texts) - 1} ")
    assert reasons == {"gzip_cut" if ending == ".gz" else "zstd_cut": 1}
    texts, reasons = outcome("jsonl", tmp_path / f"b.jsonl{ending}", packed + packed)
    assert len(texts) == 40_000 and not reasons  # members behind each other
    form = "gzip" if ending == ".gz" else "zstd"
    texts, reasons = outcome("jsonl", tmp_path / f"c.jsonl{ending}", packed[:-50_000] + b"\xff" * 50_000)
    assert len(texts) > 10_000 and reasons.keys() & {f"{form}_broken", f"{form}_cut"}
    assert outcome("jsonl", tmp_path / f"d.jsonl{ending}", ROW)[1] == {"not_compressed": 1}


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_bomb_ends_at_its_ratio_and_holds_no_memory(ending: str, tmp_path: Path) -> None:
    rows = COMPRESSIONS[ending](ROW + b" " * 100_000_000 + b"\n" + ROW)
    start = time.monotonic()
    assert outcome("jsonl", tmp_path / f"a.jsonl{ending}", rows, max_bytes=1000) == (["next"], {"bomb": 1})
    assert outcome("html", tmp_path / f"a.html{ending}", rows, max_bytes=1000)[1].keys() <= {"bomb", "too_large"}
    assert time.monotonic() - start < 5


def test_a_bomb_in_a_page_of_an_archive_costs_that_page(tmp_path: Path) -> None:
    html = "Content-Type: text/html"
    bombs = [
        response(gzip.compress(b"a" * 50_000_000), html, "Content-Encoding: gzip"),
        response(zlib.compress(b"a" * 50_000_000), html, "Content-Encoding: deflate"),
    ]
    data = b"".join([*bombs, response(page("next"))])
    texts, reasons = outcome("warc", tmp_path / "a.warc", data, max_bytes=100_000)
    assert texts == [page("next").decode()] and reasons.get("bomb", 0) + reasons["too_large"] == 2
    tracemalloc.start()
    outcome("warc", tmp_path / "a.warc", max_bytes=100_000)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 10_000_000


def test_a_long_line_is_skipped_and_the_next_is_read(tmp_path: Path) -> None:
    long = b'{"text": "' + b"a" * 3_000_000 + b'"}\n'
    data = ROW + long + ROW + long[:-1]
    assert outcome("jsonl", tmp_path / "a.jsonl", data, max_bytes=2_000_000) == (["next"] * 2, {"too_large": 2})
    rows = b"id,text\n1,a\n2," + b"b" * 3_000_000 + b"\n3,c\n"
    assert outcome("csv", tmp_path / "a.csv", rows, max_bytes=2_000_000) == (["a", "c"], {"too_large": 1})


@pytest.mark.slow
def test_a_line_of_1_gb_holds_no_memory(tmp_path: Path) -> None:
    with open(tmp_path / "a.jsonl", "wb") as file:
        file.writelines([ROW, *[b"a" * 10_000_000] * 100, b"\n", ROW])
    script = (
        "from tests.data.clean.hostile import collected, peak_bytes; "
        f"print(len(collected('jsonl', {str(tmp_path)!r})[0]), peak_bytes())"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=100)
    documents, peak_bytes = map(int, done.stdout.split())
    assert documents == 2 and peak_bytes < 500_000_000  # 50 MB are held, once in pieces and once whole


def test_a_quote_that_never_ends_costs_its_row(tmp_path: Path) -> None:
    rows = b'id,text\n1,"a"\n2,"never ended\n3,"b ""quoted"""\n4,5" disk\n5,c,d\n\n6,"two\nlines"\n'
    path = tmp_path / "a.csv"
    assert outcome("csv", path, b'id,text\n1,"a"\n2,"never ended\n3,"b"\n4,c\n') == (["a", "b", "c"], {"csv_quote": 1})
    texts, reasons = outcome("csv", path, rows)
    assert texts[0] == "a" and texts[-1] == "two\nlines" and reasons["csv_fields"] >= 1
    assert outcome("csv", path, b"id,text,id\n1,a,2\n") == ([], {"csv_header": 1})
    assert outcome("csv", path, b"id,body\n1,a\n") == ([], {"no_field": 1})


def test_deep_nesting_is_refused(tmp_path: Path) -> None:
    deep = b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"
    assert outcome("jsonl", tmp_path / "a.jsonl", deep + ROW) == (["next"], {"too_deep": 1})
    assert outcome("dialogue", tmp_path / "b.json", b"[" * 100_000)[1] == {"json_broken": 1}
    texts, _ = outcome("html", tmp_path / "a.html", b"<div>" * 100_000)
    assert texts == ["<div>" * 100_000]  # HTML is parsed by the step that extracts


def test_bytes_that_are_no_text_are_replaced_or_skipped_and_counted(tmp_path: Path) -> None:
    cases = {
        b'{"text": "a\0b"}': ["ab"],
        b'{"text": "a\\u0000b \\ud83d\\ude00 \\ud800c"}': ["ab \U0001f600 \ufffdc"],
        b'{"text": "' + b"some text " * 5 + b'\x81\xff\xfe"}': None,
    }
    for line, expected in cases.items():
        documents, counts, _ = collected("jsonl", write(tmp_path / "a.jsonl", line + b"\n" + ROW))
        assert documents[-1].text == "next" and counts["documents_out"] + sum(dropped(counts).values()) == 2
        assert expected is None or [each.text for each in documents[:-1]] == expected
        assert expected is None or any(name.startswith("mended/") for name in counts)
    for data in (random.Random(0).randbytes(10_000), b"\0" * 10_000, b"a\0" * 100):
        assert outcome("text", tmp_path / "a.txt", data) == ([], {"binary": 1})
    assert outcome("text", tmp_path / "a.txt", "\ufeffé".encode("utf-16"))[0] == ["\ufeffé"]


def test_only_charsets_that_are_safe_are_believed() -> None:
    names = ("punycode", "idna", "zlib", "unicode_escape", "utf-7", "x" * 50, "a\0b", "")
    assert [charset(name) for name in names] == [None] * 8
    assert [charset(name) for name in ("Latin-1", "UTF8", "gbk", "windows-1251")] == [
        "cp1252",
        "utf-8",
        "gb18030",
        "cp1251",
    ]


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_nothing_but_files_of_the_folder_is_opened(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "named.txt").mkdir(parents=True)
    write(folder / "named.txt" / "in.txt", b"in")
    write(tmp_path / "secret.txt", b"secret")
    os.mkfifo(folder / "pipe.txt")
    (folder / "out.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "loop").symlink_to(folder)
    (folder / "up").symlink_to(tmp_path)
    (folder / "gone.txt").symlink_to("nowhere")
    write(folder / "empty.txt", b"")
    (folder / os.fsdecode(b"\xff.txt")).write_bytes(b"odd name")
    reasons = {"link": 4, "not_a_file": 1, "empty_file": 1}
    texts, found = outcome("text", folder)
    assert (sorted(texts), found) == (["in", "odd name"], reasons)
    assert sorted(outcome("text", Path(f"{folder}/**/*.txt"))[0]) == ["in", "odd name"]
    for place in (folder / "pipe.txt", Path("/dev/zero"), folder / "named.txt" / "absent.txt"):
        assert outcome("text", place)[1] in ({"not_a_file": 1}, {"vanished": 1})
    documents, _, _ = collected("text", folder)
    assert json.dumps([each.metadata for each in documents], ensure_ascii=False).encode() and any(
        each.id.endswith("\\xff.txt#1") for each in documents
    )


def test_wrong_lengths_in_an_archive_cost_their_records(tmp_path: Path) -> None:
    one, other = response(page("one")), response(page("other"))
    content = one.partition(b"\r\n\r\n")[2][:-4]
    path = tmp_path / "a.warc"
    short, long = (record("response", content, len(content) + more) for more in (-20, 30))
    assert outcome("warc", path, short + other) == ([page("other").decode()], {"warc_length": 1})
    texts, reasons = outcome("warc", path, long + other + one)
    assert texts == [page("one").decode()] and reasons == {"warc_length": 2}
    endless = record("response", content, 10**12)
    assert outcome("warc", path, one + endless + other) == ([page("one").decode()], {"warc_cut": 1})
    for length in ("-5", "x", "9" * 30):
        bad = one.replace(f"Content-Length: {len(content)}".encode(), f"Content-Length: {length}".encode())
        texts, reasons = outcome("warc", path, bad + other)
        assert texts == [page("other").decode()] and reasons["warc_length"] == 1
    many = b"WARC/1.0\r\n" + b"a: b\r\n" * 100_000 + b"\r\n"
    assert outcome("warc", path, many + other) == ([page("other").decode()], {"warc_headers": 1})
    assert outcome("warc", path, one[:-40]) == ([], {"warc_cut": 1})


def test_a_broken_table_keeps_the_rows_before_the_break(tmp_path: Path) -> None:
    whole = parquet()
    assert outcome("parquet", tmp_path / "a.parquet", whole)[0] == TEXTS
    assert outcome("parquet", tmp_path / "a.parquet", whole[:-9])[1] == {"tables_broken": 1}
    assert outcome("parquet", tmp_path / "a.parquet", b"")[1] == {"tables_broken": 1}
    assert outcome("parquet", tmp_path / "a.parquet", whole, field="other")[1] == {"no_field": 1}
    rows = pyarrow.table({"text": [f"row {i} " + random.Random(i).randbytes(50).hex() for i in range(4000)]})
    file = tmp_path / "b.parquet"
    pyarrow.parquet.write_table(rows, file, row_group_size=1000, compression="none", use_dictionary=False)
    data = bytearray(file.read_bytes())
    place = data.index(b"row 2000")
    data[place - 40 : place] = b"\xff" * 40  # the head of the third group's page
    texts, reasons = outcome("parquet", file, bytes(data))
    assert len(texts) >= 1900 and sum(reasons.values()) == 1


def test_a_table_that_fills_the_memory_ends_its_process_only(tmp_path: Path) -> None:
    rows = pyarrow.table({"text": pyarrow.DictionaryArray.from_arrays([0] * 2000, ["a" * 2_000_000])})
    pyarrow.parquet.write_table(rows, tmp_path / "a.parquet")
    write(tmp_path / "b.parquet", parquet())
    texts, reasons = outcome("parquet", tmp_path, max_memory_bytes=400_000_000, max_bytes=1_000_000)
    assert texts[-3:] == TEXTS and set(reasons) <= {"too_large", "out_of_memory", "tables_broken", "reader_died"}
    copy = tmp_path / "c.parquet.gz"
    assert outcome("parquet", copy, gzip.compress(random.Random(0).randbytes(50_000)), max_copy_bytes=10_000)[1] == {
        "too_large": 1
    }


def test_a_pdf_that_loops_or_is_broken_costs_one_document(tmp_path: Path) -> None:
    kids = "<</Type/Pages/Kids[2 0 R 2 0 R]/Count 99999999>>"
    write(tmp_path / "a.pdf", assembled(["<</Type/Catalog/Pages 2 0 R>>", kids]))
    write(tmp_path / "b.pdf", pdf()[:-60])
    write(tmp_path / "c.pdf", b"no PDF")
    write(tmp_path / "d.pdf", pdf(("next",)))
    texts, reasons = outcome("pdf", tmp_path, timeout_s=5.0)
    assert texts[-1] == "next" and len(texts) + sum(reasons.values()) == 4 and reasons["pdf_broken"] >= 1
    documents, counts, _ = collected("pdf", tmp_path / "d.pdf", max_pages=1)
    assert documents[0].metadata["pages"] == 1 and not counts["mended/pdf_pages_left_out"]
    documents, counts, _ = collected("pdf", write(tmp_path / "e.pdf", pdf()), max_pages=1)
    assert documents[0].text == "The first page" and counts["mended/pdf_pages_left_out"] == 1


def test_a_pdf_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    endless = "BT /F 12 Tf " + "(a) Tj 1 0 0 1 0 0 Tm " * 400_000 + "ET"
    data = pdf(("x",)).replace(b"BT /F 12 Tf 50 700 Td (x) Tj ET", endless.encode())
    write(tmp_path / "a.pdf", data.replace(b"/Length 31", f"/Length {len(endless)}".encode()))
    write(tmp_path / "b.pdf", pdf(("next",)))
    start = time.monotonic()
    texts, reasons = outcome("pdf", tmp_path, timeout_s=1.5)
    assert texts == ["next"] and reasons == {"timeout": 1} and time.monotonic() - start < 20


def drawn(count: int, seed: int, timeout_s: float) -> dict:
    """Returns what became of drawn files, in a process with 1 GB."""
    environment = os.environ | {"ARROW_DEFAULT_MEMORY_POOL": "system"}
    command = [sys.executable, "-m", "tests.data.clean.hostile", str(count), str(seed)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout)
    assert said["peak_bytes"] < 600_000_000 and said["slowest_batch_s"] < 60, said
    return said["counts"]


def files(counts: dict[str, int]) -> int:
    return sum(count for name, count in counts.items() if name.endswith("/files"))


def test_500_drawn_files_are_read_or_counted() -> None:
    assert files(drawn(500, 0, 100)) == 500


@pytest.mark.slow
@pytest.mark.timeout(1300)
def test_10000_drawn_files_are_read_or_counted() -> None:
    assert files(drawn(10_000, 1, 1200)) == 10_000
