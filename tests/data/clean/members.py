"""Makes one valid file of every type that `data.collect` reads, and reads files with it."""

from __future__ import annotations

import gzip
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import zstandard
from datatrove.data import Document

from llmtrain.config.clean import CollectConfig
from llmtrain.data.clean.collect import Collect

TEXTS = ["The first text, with é and 漢.", "A second one\nof two lines.", 'The third: "quoted", and a comma.']


class Examples:
    """Keeps what a writer of dropped documents is given."""

    def __init__(self) -> None:
        self.documents: list[Document] = []

    def __enter__(self) -> Examples:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True

    def write(self, document: Document, rank: int = 0) -> None:
        self.documents.append(document)


def collected(type_: str, path: Path | str, **keys: Any) -> tuple[list[Document], Counter[str], list[Document]]:
    """Returns (documents, counts, examples of what was skipped) of an input."""
    config = CollectConfig(name="input", type=type_, path=str(path), **keys)
    examples = Examples()
    step = Collect(config, examples, 10_000_000)
    documents = list(step.run())
    return documents, counts_of(step), examples.documents


def counts_of(step: Collect) -> Counter[str]:
    return Counter({name: int(value.total) for name, value in step.stats.stats.items()})


def dropped(counts: Counter[str]) -> dict[str, int]:
    return {name.removeprefix("dropped/"): count for name, count in counts.items() if name.startswith("dropped/")}


def json_lines(texts: list[str] = TEXTS) -> bytes:
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()


def csv_rows(texts: list[str] = TEXTS) -> bytes:
    quoted = ['"' + text.replace('"', '""') + '"' for text in texts]
    return ("id,text\r\n" + "".join(f"{i},{text}\r\n" for i, text in enumerate(quoted))).encode()


def parquet(texts: list[str] = TEXTS) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": text, "url": "u"} for text in texts]), file)
    return file.getvalue()


def page(text: str) -> bytes:
    return f"<!doctype html><html><head><meta charset=utf-8></head><body><p>{text}</p></body></html>".encode()


def record(kind: str, content: bytes, length: int | None = None) -> bytes:
    lines = [f"WARC-Type: {kind}", "WARC-Target-URI: https://example.org/a", "WARC-Date: 2026-01-02T03:04:05Z"]
    lines.append(f"Content-Length: {len(content) if length is None else length}")
    return ("WARC/1.0\r\n" + "".join(line + "\r\n" for line in lines) + "\r\n").encode() + content + b"\r\n\r\n"


def response(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    lines = "".join(header + "\r\n" for header in headers or ("Content-Type: text/html; charset=utf-8",))
    return record("response", f"HTTP/1.1 {status}\r\n{lines}\r\n".encode() + body)


def warc(texts: list[str] = TEXTS) -> bytes:
    return record("warcinfo", b"software: none\r\n") + b"".join(response(page(text)) for text in texts)


def wet(texts: list[str] = TEXTS) -> bytes:
    return b"".join(record("conversion", text.encode()) for text in texts)


def dialogues(texts: list[str] = TEXTS) -> bytes:
    turns = [[{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}] for text in texts]
    return "".join(json.dumps({"messages": each}) + "\n" for each in turns).encode()


def pdf(lines: tuple[str, ...] = ("The first page", "The second page")) -> bytes:
    """Returns a PDF with a page for each line."""
    kids = " ".join(f"{4 + 2 * i} 0 R" for i in range(len(lines)))
    objects = ["<</Type/Catalog/Pages 2 0 R>>", f"<</Type/Pages/Kids[{kids}]/Count {len(lines)}>>"]
    objects.append("<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>")
    for i, line in enumerate(lines):
        drawn = f"BT /F 12 Tf 50 700 Td ({line}) Tj ET"
        objects.append(
            f"<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Resources<</Font<</F 3 0 R>>>>/Contents {5 + 2 * i} 0 R>>"
        )
        objects.append(f"<</Length {len(drawn)}>>stream\n{drawn}\nendstream")
    return assembled(objects)


def assembled(objects: list[str]) -> bytes:
    """Returns a PDF of these objects, numbered from 1, the first of which is its catalogue."""
    out, places = b"%PDF-1.4\n", []
    for number, each in enumerate(objects, 1):
        places.append(len(out))
        out += f"{number} 0 obj{each}endobj\n".encode("latin-1")
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    end = f"trailer<</Size {len(objects) + 1}/Root 1 0 R>>\nstartxref\n{len(out)}\n%%EOF\n"
    return out + f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}{end}".encode()


MEMBERS = {
    "text": ("a.txt", TEXTS[0].encode()),
    "markdown": ("a.md", b"# Title\n\nSome *text*.\n"),
    "jsonl": ("a.jsonl", json_lines()),
    "parquet": ("a.parquet", parquet()),
    "csv": ("a.csv", csv_rows()),
    "warc": ("a.warc", warc()),
    "wet": ("a.wet", wet()),
    "html": ("a.html", page(TEXTS[0])),
    "pdf": ("a.pdf", pdf()),
    "code": ("a.py", b"# SPDX-License-Identifier: MIT\nprint('a')\n"),
    "dialogue": ("a.jsonl", dialogues()),
}
"""By type: the name of a file, and what is in it."""
COMPRESSIONS = {"": lambda data: data, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}
