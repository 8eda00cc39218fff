"""Drops pages by their addresses."""

from __future__ import annotations

from pathlib import Path

from datatrove.data import Document

from llmtrain.config.clean.web import UrlConfig, WordsConfig
from llmtrain.data.clean.step import Check


def make(settings: UrlConfig, words: WordsConfig) -> Check:
    """Returns a check with datatrove's reasons: `domain`, `subdomain`, `url`, `hard_blacklisted` (a blocked word),
    `soft_blacklisted`, `blacklisted_subword`. Pages without an address stay. Nothing is downloaded: the list of public
    suffixes is the one that tldextract comes with. Raises ValueError if a list cannot be read."""
    from datatrove.pipeline.filters.url_filter import URLFilter
    from tldextract import TLDExtract

    filter_ = URLFilter(
        extra_domains=lines(settings.blocked_domains, "blocked_domains"),
        banned_words=lines(settings.blocked_words, "blocked_words"),
        use_integrated_lists=settings.bundled_lists,
    )
    filter_.tldextractor = TLDExtract(suffix_list_urls=(), cache_dir=None)

    def check(document: Document) -> str | None:
        address = document.metadata.get("url")
        verdict = filter_.filter(document) if address else True
        return None if verdict is True else verdict[1]

    return check


def lines(path: str | None, key: str) -> list[str]:
    """Returns the lines of a list in lower case, empty ones and comments ("#") left out."""
    if path is None:
        return []
    try:
        found = [line.strip().lower() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"data.clean.url.{key}={path}: must be a text file in UTF-8 ({error}); correct the path, or write null"
        ) from None
    return [line for line in found if line and not line.startswith("#")]
