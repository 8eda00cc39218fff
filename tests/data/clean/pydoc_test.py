"""The small web of pydoc's pages: the same in every process, without what belongs to this one."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections import Counter

import pytest

pytest.importorskip("datatrove")

from llmtrain.data.clean.read.pydoc import MODULES, card, pages
from tests.conftest import ROOT

CODE = (
    "import hashlib; from llmtrain.data.clean.read.pydoc import pages\n"
    "print(hashlib.sha256(''.join(map(str, pages())).encode()).hexdigest())"
)


def test_pages_are_the_same_in_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    import csv

    csv.register_dialect("mine", delimiter=";")
    monkeypatch.setattr("textwrap.dedent", lambda text: text)  # as another package may change it
    own = hashlib.sha256("".join(map(str, pages())).encode()).hexdigest()
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7", "HOME": "/nowhere", "TMPDIR": "/dev/shm"}
    other = subprocess.run(
        [sys.executable, "-c", CODE], env=env, capture_output=True, text=True, timeout=60, check=True
    )
    assert other.stdout.strip() == own


def test_nothing_of_this_process_is_in_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    whole = "".join(page.text for page in pages())
    assert "hunter2" not in whole and sys.prefix not in whole and " at 0x" not in whole
    assert "<table" not in whole


def test_what_is_planted() -> None:
    found = list(pages())
    assert Counter(page.planted for page in found) == {"": 51, "pii": 17, "near": 13, "copy": 11, "empty": 5}
    texts = {page.url: page.text for page in found}
    copies = [page for page in found if page.planted == "copy"]
    assert all(page.text == texts[page.url.replace("/mirror", "")] for page in copies)
    near = [(page.text, texts[page.url.replace("/old", "")]) for page in found if page.planted == "near"]
    assert sum(old != new for old, new in near) >= 10 and len(MODULES) == 68


def test_cards_are_valid() -> None:
    import random

    for digits in (list(map(int, card(random.Random(seed)))) for seed in range(20)):
        doubled = [d * 2 - 9 * (d > 4) if place % 2 == 0 else d for place, d in enumerate(digits)]
        assert len(digits) == 16 and sum(doubled) % 10 == 0
