"""Reads files that are one document each: text, Markdown, HTML pages, PDF."""

from __future__ import annotations

from collections.abc import Iterator

from llmtrain.config.clean import CollectConfig
from llmtrain.data.clean.read.apart import Apart
from llmtrain.data.clean.read.items import Found, Item
from llmtrain.data.clean.read.stream import whole
from llmtrain.data.clean.read.text import declared, decode


def text_file(path: str, config: CollectConfig, _: Apart) -> Iterator[Item]:
    """Yields the document of a text or Markdown file."""
    data = whole(path, config)
    if data:
        text, notes = decode(data)
        yield Found(1, text, {}, notes)


def html_file(path: str, config: CollectConfig, _: Apart) -> Iterator[Item]:
    """Yields a page as it is, its HTML as the text, decoded by what it declares."""
    data = whole(path, config)
    if data:
        text, notes = decode(data, declared(data))
        yield Found(1, text, {}, notes)


def pdf_file(path: str, config: CollectConfig, apart: Apart) -> Iterator[Item]:
    """Yields the text of a PDF, which a process with limits extracts."""
    if data := whole(path, config):
        yield from apart.items("pdf:pdf_items", data, config.max_pages, config.max_bytes)
