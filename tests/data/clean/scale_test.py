"""The memory of a task does not grow with the corpus: ten times the documents through every phase."""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("datatrove")

from llmtrain.config.clean import CleanConfig, CollectConfig, ExecutionConfig
from llmtrain.data.clean.execute import command
from llmtrain.data.clean.job import Job, make_job, phases
from tests.conftest import ROOT

SMALL, LARGE = 1_500, 15_000  # documents of about 1 kB


def write_corpus(path: Path, documents: int) -> None:
    """Prose of drawn sentences, of which one document in ten is a copy."""
    rng = random.Random(0)
    from pydoc_data.topics import topics

    words = sorted({word for text in topics.values() for word in text.split() if word.isalpha()})
    last = ""
    with open(path, "w") as file:
        for number in range(documents):
            sentences = (" ".join(["The", *rng.choices(words, k=12), "is", "of", "that"]) for _ in range(12))
            last = last if number % 10 == 9 else ".\n".join(sentences) + "."
            file.write(json.dumps({"text": last}) + "\n")


def made(folder: Path, documents: int) -> Job:
    folder.mkdir()
    write_corpus(folder / "rows.jsonl", documents)
    inputs = [CollectConfig(name="rows", type="jsonl", kind="web", path=str(folder / "rows.jsonl"))]
    clean = CleanConfig(extract=None, repetition=None, quality={"max_mean_word_chars": None})
    job = make_job(str(folder / "clean"), inputs, clean, ExecutionConfig())
    os.mkdir(job.root)
    job.write()
    return job


def peaks_bytes(job: Job) -> dict[str, int]:
    """The largest memory of each phase's task, which runs in a process of its own."""
    found = {}
    for phase in phases(job):
        process = subprocess.Popen(command(job.root, phase.name, 0), cwd=ROOT, stderr=subprocess.PIPE)
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0, process.stderr and process.stderr.read()[-2000:]
        process.returncode = 0
        found[phase.name] = usage.ru_maxrss * 1024
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_times_the_documents(tmp_path: Path) -> None:
    small, large = (peaks_bytes(made(tmp_path / str(n), n)) for n in (SMALL, LARGE))
    for name, peak_bytes in large.items():
        print(f"{name}: {small[name] / 2**20:.0f} MiB for {SMALL:,} documents, {peak_bytes / 2**20:.0f} for {LARGE:,}")
    kept = sum(p.stat().st_size for p in (tmp_path / str(LARGE) / "clean/documents").rglob("*.zst"))
    assert kept > 1_000_000, "the documents went through"
    # 40 MiB: words and their pieces are remembered up to a bound; duplicates are remembered by 16 bytes each
    assert all(peak_bytes < small[name] + 40 * 2**20 for name, peak_bytes in large.items())
