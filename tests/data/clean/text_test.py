"""Text in eight bits that no detector is sure of is kept and marked as a guess; what is no text stays out."""

from __future__ import annotations

import gzip
import random
import struct
import sys
import zlib
from pathlib import Path

import pytest

pytest.importorskip("datatrove")

from llmtrain.data.clean.read.items import UnusableError
from llmtrain.data.clean.read.text import decode, guessed
from tests.data.clean.members import collected, dropped

NAIVE = "A naïve fiancée.\n"  # the detector says maccentraleurope, which is not among the charsets
PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0) + zlib.compress(b"\x7f" * 192)


@pytest.mark.parametrize("charset", ["cp1252", "latin-1"])
def test_western_text_is_kept_and_marked(charset: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("naïve".encode(charset))
    (tmp_path / "b.txt").write_bytes(b"plain")
    documents, counts, _ = collected("text", tmp_path)
    assert [(each.text, each.metadata.get("encoding")) for each in documents] == [("naïve", "cp1252"), ("plain", None)]
    assert counts["mended/charset_guessed"] == 1 and not dropped(counts)
    documents, counts, _ = collected("text", tmp_path, guess_charset=False)
    assert [each.text for each in documents] == ["plain"] and dropped(counts) == {"binary": 1}
    (tmp_path / "a.jsonl").write_bytes('{"text": "naïve"}\n{"text": "plain"}\n'.encode(charset))
    assert [each.text for each in collected("jsonl", tmp_path / "a.jsonl")[0]] == ["naïve", "plain"]


@pytest.mark.parametrize(
    "data",
    [
        PNG,
        Path(sys.executable).read_bytes()[:100_000],  # ELF, or what this machine has
        gzip.compress(NAIVE.encode() * 50, mtime=0)[2:],  # without the bytes by which it is known
        zlib.compress(NAIVE.encode()),
        random.Random(1).randbytes(5000),
        *(bytes(random.Random(seed).choices(range(128, 256), k=200)) for seed in range(20)),  # no control characters
        *(random.Random(seed).randbytes(40) for seed in range(20)),
        "привет".encode("koi8-r"),  # letters, none of them ASCII
        b"\xe9",
        b"\xa4\xa4" * 30,  # signs, no letters
    ],
    ids=lambda data: f"{zlib.crc32(data):08x}",
)
def test_what_is_no_text_is_binary(data: bytes) -> None:
    assert guessed(data) is None
    try:
        assert decode(data)[1] in (("charset_detected",), ())  # a detector may take a few bytes for any language
    except UnusableError as error:
        assert str(error) == "binary"


def test_a_guess_is_not_made_of_broken_utf_8() -> None:
    broken = "Ça va très bien, mon élève préféré".encode() + b"\xff"
    assert decode(broken) == ("Ça va très bien, mon élève préféré\ufffd", ("bytes_replaced",))


def test_text_by_its_letters() -> None:
    """Of ten characters seven are letters, of these four ASCII: as few are enough, fewer may be another alphabet."""
    assert guessed("abcd ÄÖÜ !!!".encode("cp1252")) == "abcd ÄÖÜ !!!"
    assert guessed("ab ÄÖÜ !!".encode("cp1252")) is None
    assert guessed("a!!é!!".encode("cp1252")) is None and guessed("a!é!".encode("cp1252")) == "a!é!"
    assert guessed(b"caf\xe9\x07") is None and guessed(b"caf\x81\xe9") is None and guessed(b"") is None
    assert guessed(b"\x93caf\xe9\x94 \x80") == "“café” €"
