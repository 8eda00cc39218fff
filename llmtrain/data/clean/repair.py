"""Mends text that was decoded wrongly, and removes characters that no reader sees."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from datatrove.data import Document

from llmtrain.config.clean.web import RepairConfig, WordsConfig
from llmtrain.data.clean.step import Check

if TYPE_CHECKING:
    from ftfy import TextFixerConfig

CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and line feed
LINES = re.compile(r"[^\n]*\n|[^\n]+")
PLAIN = re.compile(
    r"[\t\n\x20-\x25\x27-\x7e]*"
)  # ASCII without "&", which may begin an entity: ftfy changes none of it


def make(settings: RepairConfig, words: WordsConfig) -> Check:
    """Returns a check that drops only what is `empty` afterwards. A document that it changed has `repaired: true` in
    its metadata. HTML entities are left in code, where they may be meant."""
    from datatrove.pipeline.formatters.ftfy import FTFYFormatter

    form = None if settings.normalization == "none" else settings.normalization
    fixer = FTFYFormatter(fix_line_breaks=True, normalization=form).config
    literal = fixer._replace(unescape_html=False)

    def check(document: Document) -> str | None:
        config = literal if document.metadata.get("kind") == "code" else fixer
        fixed = CONTROLS.sub("", "".join(repaired_lines(document.text, config)))
        if fixed != document.text:
            document.text = fixed
            document.metadata["repaired"] = True
        return None if fixed.strip() else "empty"

    return check


def repaired_lines(text: str, config: TextFixerConfig) -> Iterator[str]:
    """Yields the lines of a text as ftfy mends them, which looks at each by itself, but takes no entity for one after a
    "<"; lines that it would not change are not given to it."""
    import ftfy

    for line in LINES.findall(text):
        if config.unescape_html == "auto" and "<" in line:
            config = config._replace(unescape_html=False)
        yield line if PLAIN.fullmatch(line) else ftfy.fix_text(line, config=config)
