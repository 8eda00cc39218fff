"""Reads web archives: HTML pages of WARC files, extracted texts of WET files (ISO 28500).

warcio parses the headers and the chunks of HTTP; records are cut out here, so that a wrong length, an endless header or
a bomb costs one record, and reading goes on at the next line that begins one.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from typing import Any

from llmtrain.config.clean import CollectConfig
from llmtrain.data.clean.read.apart import Apart
from llmtrain.data.clean.read.items import BrokenError, Found, Item, Skipped, UnusableError
from llmtrain.data.clean.read.stream import GZIP, PIECE_BYTES, ZSTD, open_bytes, unpacked
from llmtrain.data.clean.read.text import declared, decode

HEADER_BYTES = 2**18  # of all headers of a record, or of the page in it
HTML_TYPES = ("text/html", "application/xhtml+xml")
Record = tuple[int, Any, bytes]


def warc_file(path: str, config: CollectConfig, _: Apart) -> Iterator[Item]:
    """Yields the HTML pages of responses; every other record is skipped and counted."""
    return archive(path, config, page)


def wet_file(path: str, config: CollectConfig, _: Apart) -> Iterator[Item]:
    """Yields the texts of conversion records; every other record is skipped and counted."""
    return archive(path, config, conversion)


def archive(path: str, config: CollectConfig, document: Any) -> Iterator[Item]:
    """Yields what `document` makes of each record."""
    with open_bytes(path, config) as stream:
        for record in records(stream, config.max_bytes):
            if isinstance(record, Skipped):
                yield record
                continue
            number, headers, content = record
            try:
                text, notes = document(headers, content, config)
            except UnusableError as error:
                yield Skipped(number, str(error))
                continue
            url, date = headers.get_header("WARC-Target-URI"), headers.get_header("WARC-Date")
            yield Found(number, text, {"url": url and url.strip("<>"), "date": date}, notes)


def records(stream: io.BufferedReader, max_bytes: int) -> Iterator[Record | Skipped]:
    """Yields (number from 1, headers, content) of each record, or why it is skipped. Raises BrokenError where the file
    ends within a record."""
    number = 0
    line, known = stream.readline(PIECE_BYTES), False  # known: what is lost before the next record was counted
    while True:
        line, lost = next_record(line, stream)
        if lost and not known:
            yield Skipped(None, "warc_between_records")
        if not line:
            return
        number, known = number + 1, True
        try:
            headers = parsed(header_block(line, stream), "warc")
            content = content_of(headers, stream, max_bytes)
        except UnusableError as error:
            yield Skipped(number, str(error))
            line = stream.readline(PIECE_BYTES)
            continue
        line = stream.readline(PIECE_BYTES)
        if line.strip() and not line.startswith(b"WARC/"):  # the length is wrong, so the content is another's too
            yield from (Skipped(number, "warc_length") for _ in range(1 + content.count(b"\r\n\r\nWARC/1.")))
            continue
        known = False
        yield number, headers, content


def next_record(line: bytes, stream: io.BufferedReader) -> tuple[bytes, bool]:
    """Returns (the next line that begins a record or nothing at the end, whether other lines stood before it)."""
    lost = False
    while line and not line.startswith(b"WARC/"):
        lost, line = lost or bool(line.strip()), stream.readline(PIECE_BYTES)
    return line, lost


def header_block(line: bytes, stream: io.BufferedReader) -> bytes:
    """Returns the lines of headers from `line` to the blank one. Raises UnusableError when there are too many."""
    block = [line]
    left = HEADER_BYTES - len(line)
    while line.strip():
        line = stream.readline(PIECE_BYTES)
        block.append(line)
        left -= len(line) + 1
        if left < 0:
            raise UnusableError("warc_headers")
        if not line:
            raise BrokenError("warc_cut")
    return b"".join(block)


def parsed(block: bytes, what: str) -> Any:
    """Returns headers by warcio: get_header(name), and the status of HTTP as get_statuscode(). Raises UnusableError
    when they cannot be parsed."""
    from warcio.recordloader import ArcWarcRecordLoader
    from warcio.statusandheaders import StatusAndHeadersParser, StatusAndHeadersParserException

    kinds = ArcWarcRecordLoader.WARC_TYPES if what == "warc" else ArcWarcRecordLoader.HTTP_TYPES
    try:
        return StatusAndHeadersParser(kinds).parse(io.BytesIO(block))
    except (StatusAndHeadersParserException, EOFError):
        raise UnusableError(f"{what}_headers") from None


def content_of(headers: Any, stream: io.BufferedReader, max_bytes: int) -> bytes:
    """Returns the bytes of a record. Raises UnusableError when it is too large, which is read over, or has no length;
    BrokenError when the file ends before it."""
    said = (headers.get_header("Content-Length") or "").strip()
    if not (said.isascii() and said.isdigit() and len(said) < 19):
        raise UnusableError("warc_length")
    length = int(said)
    if length <= max_bytes:
        content = stream.read(length)
        if len(content) < length:
            raise BrokenError("warc_cut")
        return content
    while length > 0:
        if not (piece := stream.read(min(length, PIECE_BYTES))):
            raise BrokenError("warc_cut")
        length -= len(piece)
    raise UnusableError("too_large")


def conversion(headers: Any, content: bytes, _: CollectConfig) -> tuple[str, tuple[str, ...]]:
    """Returns (text, notes) of a conversion record."""
    if headers.get_header("WARC-Type") != "conversion":
        raise UnusableError("no_conversion")
    return decode(content)


def page(headers: Any, content: bytes, config: CollectConfig) -> tuple[str, tuple[str, ...]]:
    """Returns (HTML, notes) of a response with a page in it."""
    if headers.get_header("WARC-Type") != "response":
        raise UnusableError("no_response")
    http, body = http_parts(content)
    if not (http.get_statuscode() or "").startswith("2"):
        raise UnusableError("http_status")
    media, _, parameters = (http.get_header("Content-Type") or "").partition(";")
    body = decoded_body(http, body, config)
    media = headers.get_header("WARC-Identified-Payload-Type") or media.strip().lower() or sniffed(body)
    if media not in HTML_TYPES:
        raise UnusableError("no_html")
    named = parameters.lower().partition("charset=")[2].split(";")[0].strip(" \"'")
    return decode(body, named or declared(body))


def http_parts(content: bytes) -> tuple[Any, bytes]:
    """Returns (headers, body) of a response."""
    ends = [at + len(mark) for mark in (b"\r\n\r\n", b"\n\n") if (at := content.find(mark, 0, HEADER_BYTES)) >= 0]
    if not ends:
        raise UnusableError("http_headers")
    return parsed(content[: min(ends)], "http"), content[min(ends) :]


def decoded_body(http: Any, body: bytes, config: CollectConfig) -> bytes:
    """Returns the body without chunks and compression. Crawlers often keep the headers of what they have undone."""
    from warcio.bufferedreaders import ChunkedDataReader

    if (http.get_header("Transfer-Encoding") or "").lower() == "chunked":
        body = ChunkedDataReader(io.BytesIO(body)).read()
    encoding = (http.get_header("Content-Encoding") or "").strip().lower()
    if body.startswith((GZIP, ZSTD)):
        return unpacked(body, config)
    if encoding in ("", "identity", "gzip", "x-gzip") or sniffed(body):
        return body
    if encoding == "deflate":
        return inflated(body, config)
    raise UnusableError("http_encoding")


def inflated(body: bytes, config: CollectConfig) -> bytes:
    """Returns what a body of encoding `deflate` holds, which is zlib's form or the bare one."""
    for form in (zlib.MAX_WBITS, -zlib.MAX_WBITS):
        try:
            unpacker = zlib.decompressobj(form)
            content = unpacker.decompress(body, config.max_bytes + 1)
        except zlib.error:
            continue
        if len(content) > config.max_bytes:
            raise UnusableError("too_large")
        return content
    raise UnusableError("http_encoding")


def sniffed(body: bytes) -> str:
    """Returns text/html where the first bytes are those of a page, else nothing."""
    start = body[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return "text/html" if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body")) else ""
