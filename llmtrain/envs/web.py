"""Offers pages of the web, and a search engine behind an endpoint, as tools; both reach hosts of a list alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from threading import Lock
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from llmtrain.config.clean.web import ExtractConfig
from llmtrain.config.retrieval import WebConfig
from llmtrain.config.served import token_faults, token_of
from llmtrain.data.clean.read.items import UnusableError
from llmtrain.data.clean.read.text import declared, decode
from llmtrain.data.fetch import Fetcher, Page, Refused
from llmtrain.data.post import ServerFault
from llmtrain.envs.toolbox import Tool, ToolFault

if TYPE_CHECKING:
    from llmtrain.data.clean.extract import Extractor

HTML = ("text/html", "application/xhtml+xml")
TEXT = ("application/json", "application/xml")  # beside text/*
ASKED = {"title": "title", "url": "url", "text": "content"}  # names of a result's fields, as SearXNG has them
SHOWN_CHARACTERS = 500  # of a result's text


class Reader:
    """Fetches pages as text. HTML is read in a process of its own, one page at a time."""

    def __init__(self, settings: WebConfig) -> None:
        self.settings, self.lock, self.extractor = settings, Lock(), None
        self.fetcher = Fetcher(settings.hosts, settings.max_bytes, settings.max_redirects)

    def read(self, arguments: Mapping[str, Any]) -> str:
        """Returns the text of a page below its address. Raises ToolFault where there is none for the policy."""
        page = self.page(arguments["url"])
        if page.type in HTML:
            text = self.extracted(text_of(page, declared(page.content)))
        elif page.type.startswith("text/") or page.type in TEXT:
            text = text_of(page, None)
        else:
            raise ToolFault(f"{page.url}: is of the type {page.type[:60] or 'that it does not say'}, which is no text")
        return f"{page.url}\n{text.strip()}"

    def page(self, url: str, token: str | None = None) -> Page:
        """Returns a page. Raises ToolFault where it is not allowed, or does not come."""
        try:
            return self.fetcher.get(url, self.settings.deadline_s, token)
        except (Refused, ServerFault) as error:
            raise ToolFault(str(error)) from None

    def extracted(self, page: str) -> str:
        """Returns the main text of HTML."""
        from datatrove.data import Document  # the extra `data`

        document = Document(page, "page", metadata={})
        with self.lock:
            self.extractor = self.extractor or make_extractor()
            reason = self.extractor(document)
        if reason is not None:
            raise ToolFault(f"the page has no text that can be read ({reason})")
        return document.text

    def close(self) -> None:
        """Ends the process that reads HTML."""
        with self.lock:
            if self.extractor is not None:
                self.extractor.close()


def make_extractor() -> Extractor:
    """Returns what reads HTML, with the settings of cleaning."""
    from llmtrain.data.clean.extract import Extractor

    return Extractor(ExtractConfig())


def text_of(page: Page, named: str | None) -> str:
    """Returns the content of a page as text, by the charset that the server says, else the one that it names itself.
    Raises ToolFault when it is none."""
    try:
        return decode(page.content, page.charset or named)[0]
    except UnusableError as error:
        raise ToolFault(f"{page.url}: is no text ({error})") from None


def fetch_tool(settings: WebConfig) -> Tool:
    """Returns the tool that reads a page."""
    reader = Reader(settings)
    return Tool(
        "fetch",
        "Reads a page of the web and returns its text.",
        {"url": {"type": "string", "description": f"http or https; hosts: {', '.join(settings.hosts)}"}},
        reader.read,
        close=reader.close,
    )


def web_search_tool(settings: WebConfig) -> Tool:
    """Returns the tool that asks the endpoint. Raises ValueError when its token is not there, or is none."""
    for fault in token_faults("rollout.environment.web", settings.token_env):
        raise ValueError(fault)
    token = token_of(settings.token_env)
    reader = Reader(settings.model_copy(update={"max_redirects": 0}))
    return Tool(
        "web_search",
        "Searches the web and returns titles, addresses and the beginnings of pages.",
        {"query": {"type": "string", "description": "words or a question"}},
        lambda arguments: searched(reader, arguments["query"], token),
    )


def searched(reader: Reader, query: str, token: str | None) -> str:
    """Returns the results of the endpoint, numbered. Raises ToolFault when it answers with something else."""
    settings = reader.settings
    assert settings.endpoint is not None, "a rule says so"
    url = settings.endpoint.replace("{query}", quote(query, safe="")).replace("{k}", str(settings.k))
    try:
        page = reader.page(url, token)
    except ToolFault as error:  # without the URL, which may hold a key
        raise ToolFault(f"the search engine does not answer: {str(error).rpartition(': ')[2]}") from None
    try:
        results: Any = json.loads(page.content)
        for key in settings.results.split("."):
            results = results[key]
        lines = [result_line(number, each, settings) for number, each in enumerate(results[: settings.k], 1)]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise ToolFault("the search engine answers with something else than results") from None
    return "\n\n".join(lines) or "nothing was found; try other words"


def result_line(number: int, result: Mapping[str, Any], settings: WebConfig) -> str:
    """Returns a result as a policy reads it."""
    names = ASKED | settings.fields
    title, url, text = (" ".join(str(result.get(names[key]) or "").split()) for key in ASKED)
    return f"[{number}] {title} {url}\n{text[:SHOWN_CHARACTERS]}"
