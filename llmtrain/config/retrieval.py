"""Defines the keys of what reads a store of `llmtrain index`, and of tools that reach the web."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from typing import Annotated, NamedTuple
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, PositiveInt, model_validator

from llmtrain.config.index import StoreMode
from llmtrain.config.section import DeadlineS, Section, UserPath

NAME = r"[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?"
PORTS = {"http": 80, "https": 443}
HOST = re.compile(rf"(\*\.)?{NAME}(\.{NAME})*(:\d{{1,5}})?")


class StoreConfig(Section):
    """Names a store that `llmtrain index` made, and how it is searched."""

    store: UserPath  # its directory
    k: PositiveInt = 3  # passages that are found for a question
    mode: StoreMode | None = None  # bm25, embedding or hybrid; None = hybrid where it has embeddings, else bm25


class Allowed(NamedTuple):
    """Holds an entry of a list of hosts: a name, `*.` before it for all below it, and a port; or a network."""

    name: str | None
    port: int | None  # None = 80 and 443
    network: ipaddress.IPv4Network | ipaddress.IPv6Network | None


def parsed_host(text: str) -> Allowed:
    """Returns an entry. Raises ValueError when it is none.

    Example: "*.example.org", "localhost:8080", "10.0.0.0/8", "[::1]:80"
    """
    bare, port = text.lower(), None
    if bracketed := re.fullmatch(r"\[(.+)\](?::(\d{1,5}))?", bare):
        bare, port = bracketed[1], bracketed[2]
    elif bare.count(":") == 1:
        bare, _, port = bare.partition(":")
    try:
        network = ipaddress.ip_network(bare)
    except ValueError:
        network = None
    if network is None and not HOST.fullmatch(bare):
        raise ValueError(f"{text!r}: is no host, such as example.org, *.example.org, localhost:8080 or 10.0.0.0/8")
    if port is not None and not (port.isdecimal() and 0 < int(port) < 2**16):
        raise ValueError(f"{text!r}: has no port between 1 and 65535 behind the colon")
    return Allowed(bare, None if port is None else int(port), network)


def allows(hosts: Iterable[str], host: str, port: int) -> bool:
    """Says whether a list of hosts allows this one, in ASCII, at a port."""
    return any(_fits(parsed_host(each), host, port) for each in hosts)


def _fits(allowed: Allowed, host: str, port: int) -> bool:
    """Says whether an entry of the list allows a host and port."""
    if port != allowed.port and not (allowed.port is None and port in PORTS.values()):
        return False
    if allowed.network is not None:
        try:
            return ipaddress.ip_address(host) in allowed.network
        except ValueError:
            return False
    name = allowed.name or ""
    return host.endswith(name[1:]) if name.startswith("*.") else host == name


def _host(text: str) -> str:
    parsed_host(text)
    return text


class WebConfig(Section):
    """Sets what the tools `fetch` and `web_search` may reach, and how much; see docs/rollouts/search.md."""

    hosts: list[Annotated[str, AfterValidator(_host)]] = Field([])  # no others: a.org, *.a.org (all below), a.org:8080
    max_bytes: PositiveInt = 2_000_000  # of an answer, as it is sent and as it is unpacked
    max_redirects: int = Field(5, ge=0, le=20)  # each place is checked as the first one
    deadline_s: DeadlineS = 20.0  # for a call with all its redirects
    endpoint: str | None = None  # web_search: URL that answers JSON, with {query} and perhaps {k} in it
    token_env: str | None = None  # web_search: environment variable with a token, sent as Authorization: Bearer
    results: str = "results"  # web_search: key of the list of results; a.b for one within another
    fields: dict[str, str] = Field({})  # web_search: their names for title, url and text (default: content)
    k: PositiveInt = 5  # web_search: results that are shown

    @model_validator(mode="after")
    def _endpoint(self) -> WebConfig:
        if self.endpoint is not None and (
            "{query}" not in self.endpoint or urlsplit(self.endpoint).scheme not in ("http", "https")
        ):
            raise ValueError("endpoint must be a URL of http or https with {query} where the question goes")
        if unknown := self.fields.keys() - {"title", "url", "text"}:
            raise ValueError(f"fields: {min(unknown)!r} is none of title, url and text")
        return self
