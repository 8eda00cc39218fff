"""Fetches pages over HTTP, from hosts of a list alone, in bounded time and memory.

A URL that a model wrote may point anywhere: into this machine, the network around it, or a page that leads there. So
each place is checked, and every redirect again: scheme, host and port against the list, and all addresses that the name
means. An address that is not of the public internet is refused unless it stands in the list itself. The connection goes
to an address that was checked, whatever the name means a moment later.
"""

from __future__ import annotations

import ipaddress
import socket
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from llmtrain.config.retrieval import PORTS, allows, parsed_host
from llmtrain.data.post import Answer, Dropped, ServerFault, exchange

REDIRECTS = (301, 302, 303, 307, 308)
NAT64 = ipaddress.ip_network("64:ff9b::/96")
UNICAST = ipaddress.ip_network("2000::/3")  # all of IPv6 that is handed out on the public internet
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
KEPT = "/%:@!$&'()*+,;=~-._[]?"  # what quoting leaves in a path or query
AGENT = "llmtrain"


class Refused(Exception):
    """Says why a place is not asked."""


@dataclass(frozen=True)
class Page:
    """Holds what was fetched: the place where it lies in the end, its type and charset as the server says, and its
    content, unpacked."""

    url: str
    type: str
    charset: str | None
    content: bytes


@dataclass(frozen=True)
class Fetcher:
    """Fetches from hosts of a list. Threads may share it.

    Example: Fetcher(("*.example.org",)).get("https://docs.example.org/a", 20.0).content
    """

    hosts: Sequence[str]
    max_bytes: int = 2_000_000
    max_redirects: int = 5

    def get(self, url: str, deadline_s: float, token: str | None = None) -> Page:
        """Returns a page; `token` goes with the first request alone. Raises Refused for a place that is not allowed,
        ServerFault when a server does not answer with a page of at most `max_bytes` in time."""
        deadline, headers = time.monotonic() + deadline_s, {"Accept-Encoding": "identity", "User-Agent": AGENT}
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        for _ in range(self.max_redirects + 1):
            place = self.checked(url)
            answer = self._asked(place, headers, deadline)
            headers.pop("Authorization", None)
            if answer.status not in REDIRECTS or "location" not in answer.headers:
                return self._page(place.geturl(), answer)
            url = urljoin(place.geturl(), answer.headers["location"])
        raise ServerFault(f"{url[:200]}: more than {self.max_redirects} redirects")

    def checked(self, url: str) -> SplitResult:
        """Returns a URL in parts, written as it is sent. Raises Refused unless scheme, host and port are allowed."""
        try:
            parts = urlsplit(url.strip())
            host, port = (parts.hostname or "").rstrip("."), parts.port
            host = host if host.isascii() else host.encode("idna").decode()
        except ValueError:
            raise Refused(f"{url[:200]!r} is no URL") from None
        if parts.scheme not in PORTS or not host:
            raise Refused(f"{url[:200]!r} is no URL of http or https")
        if parts.username is not None or parts.password is not None:
            raise Refused("a URL with a name or password before the host is not asked")
        if not allows(self.hosts, host, port or PORTS[parts.scheme]):
            where = host if port is None else f"{host}:{port}"
            raise Refused(f"the host {where[:200]} is not allowed; allowed: {', '.join(self.hosts)}")
        inner = f"[{host}]" if ":" in host else host
        place = inner if port is None else f"{inner}:{port}"
        return SplitResult(parts.scheme, place, quote(parts.path, KEPT), quote(parts.query, KEPT), "")

    def _asked(self, place: SplitResult, headers: dict[str, str], deadline: float) -> Answer:
        address = self._address(place)
        try:
            return exchange("GET", place, None, headers, self.max_bytes, deadline, address)
        except Dropped as error:
            raise ServerFault(f"{place.geturl()}: {error}") from error

    def _address(self, place: SplitResult) -> str:
        """Returns an address of the host. Raises Refused when one of them is not allowed, ServerFault when it has
        none."""
        host, port = place.hostname or "", place.port or PORTS[place.scheme]
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise ServerFault(f"{place.geturl()}: the host {host} is not known ({error})") from None
        addresses = [ipaddress.ip_address(str(each[4][0]).partition("%")[0]) for each in found]
        networks = [each.network for each in map(parsed_host, self.hosts) if each.network is not None]
        for address in addresses:
            listed = any(address in network for network in networks)
            if not listed and not is_public(address):
                raise Refused(f"the host {host} means the address {address}, which is not of the public internet")
        return str(addresses[0])

    def _page(self, url: str, answer: Answer) -> Page:
        if answer.status != 200:
            raise ServerFault(f"{url}: status {answer.status}")
        content = unpacked(url, answer, self.max_bytes)
        type_, _, rest = answer.headers.get("content-type", "").partition(";")
        names = (each.partition("=") for each in rest.split(";"))
        charset = next((value.strip(" \"'") for name, _, value in names if name.strip().lower() == "charset"), None)
        return Page(url, type_.strip().lower(), charset, content)


def is_public(address: Address) -> bool:
    """Says whether an address is one of the public internet, also where it wraps another one."""
    if isinstance(address, ipaddress.IPv6Address):
        wrapped = address.ipv4_mapped or address.sixtofour or (address.teredo or (None, None))[1]
        if address in NAT64:
            wrapped = ipaddress.IPv4Address(int(address) & (2**32 - 1))
        if wrapped is not None:
            return is_public(wrapped)
        if address not in UNICAST:  # site-local, IPv4-compatible, NAT64 of a local network
            return False
    return address.is_global and not address.is_multicast


def unpacked(url: str, answer: Answer, max_bytes: int) -> bytes:
    """Returns the content of an answer, of which no more than `max_bytes` are unpacked. Raises ServerFault when it
    holds more, or is packed in a form that was not asked for and is not known."""
    form = answer.headers.get("content-encoding", "identity").strip().lower()
    if form in ("identity", ""):
        return answer.body
    if form not in ("gzip", "x-gzip", "deflate"):
        raise ServerFault(f"{url}: answers in the encoding {form[:40]!r}, which was not asked for")
    unpacker = zlib.decompressobj(wbits=47)  # gzip or zlib
    try:
        content = unpacker.decompress(answer.body, max_bytes + 1)
    except zlib.error as error:
        raise ServerFault(f"{url}: answers with broken {form} ({error})") from None
    if len(content) > max_bytes:
        raise ServerFault(f"{url}: holds more than {max_bytes} bytes")
    if not unpacker.eof:
        raise ServerFault(f"{url}: answers with {form} that is cut short")
    return content
