"""Writes and reads the files of documents that one phase leaves for the next: JSON lines, compressed by zstd."""

from __future__ import annotations

from datatrove.pipeline.writers.jsonl import JsonlWriter


def writer(folder: str) -> JsonlWriter:
    """Returns what writes documents into `folder`/RANK.jsonl.zst."""
    return JsonlWriter(folder, output_filename="${rank}.jsonl", compression="zstd")
