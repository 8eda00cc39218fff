"""Fetching from servers that are slow, broken or hostile, and from places that a model should not reach."""

from __future__ import annotations

import gzip
import socket
import time
import zlib
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from ipaddress import ip_address
from typing import Any

import pytest

from llmtrain.data import fetch
from llmtrain.data.fetch import Fetcher, Page, Refused, is_public
from llmtrain.data.post import ServerFault
from tests.servers import Server, reply, serving

HTML = {"Content-Type": 'Text/HTML; charset="koi8-r"'}


def page(data: bytes = b"<p>hello", status: int = 200, **headers: str) -> Callable[[BaseHTTPRequestHandler, Any], None]:
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler, _: reply(handler, status, data, **headers)


def get(server: Server, path: str = "/x", deadline_s: float = 5.0, **settings: Any) -> Page:
    fetcher = Fetcher(settings.pop("hosts", [f"127.0.0.1:{server.server_port}"]), **settings)
    return fetcher.get(f"http://127.0.0.1:{server.server_port}{path}", deadline_s)


def test_a_page_with_its_type_and_charset() -> None:
    with serving(page(Content_Type='Text/HTML; charset="koi8-r"')) as server:
        found = get(server, "/a b/ü?q=1&r=é#part")
    assert found == Page(
        f"http://127.0.0.1:{server.server_port}/a%20b/%C3%BC?q=1&r=%C3%A9", "text/html", "koi8-r", b"<p>hello"
    )
    (path, headers, _), *more = server.asked
    assert (path, headers["Accept-Encoding"], more) == ("/a%20b/%C3%BC?q=1&r=%C3%A9", "identity", [])


@pytest.mark.parametrize(
    "url",
    [
        "ftp://a.org/",
        "file:///etc/passwd",
        "//a.org/",
        "a.org",
        "",
        "http://",
        "http://a.org:x/",
        "http://[::1/",
        "http://user@a.org/",
        "http://a.org@evil.org/",
        "http://evil.org/a.org",
        "http://a.org.evil.org/",
        "http://xa.org/",
        "http://a.org:8080/",
        "http://127.0.0.1/",
        "http://2130706433/",
        "http://\u0430.org/",  # a Cyrillic letter
        "http://b.org/",  # itself is not below itself
        "http://" + "a" * 70 + ".é/",
    ],
)
def test_places_that_are_not_in_the_list(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch.socket, "getaddrinfo", lambda *_, **__: pytest.fail("nothing is looked up"))
    with pytest.raises(Refused):
        Fetcher(["a.org", "*.b.org"]).get(url, 5.0)


@pytest.mark.parametrize("url", ["http://a.org", "https://A.org:443/x", "http://a.org./", "http://x.y.b.org:80/"])
def test_places_that_are(url: str) -> None:
    assert Fetcher(["a.org", "*.b.org"]).checked(url).hostname in ("a.org", "x.y.b.org")


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1::1", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("169.254.169.254", False),  # where clouds hand out credentials
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("fe80::1", False),
        ("fd00::1", False),
        ("::ffff:127.0.0.1", False),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
        ("64:ff9b::5db8:d822", True),
        ("64:ff9b:1::a9fe:a9fe", False),  # NAT64 of a local network
        ("::a9fe:a9fe", False),
        ("fec0::1", False),
        ("ff0e::1", False),
    ],
)
def test_addresses_of_the_public_internet(address: str, public: bool) -> None:
    assert is_public(ip_address(address)) is public


def resolved(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> list[str]:
    """Lets every name mean these addresses; returns a list of the names that are asked for."""
    asked: list[str] = []
    real = socket.getaddrinfo

    def answer(host: str, port: int, *rest: Any, **keys: Any) -> list:
        if host in addresses:  # the connection itself
            return real(host, port, *rest, **keys)
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, port)) for each in addresses]

    monkeypatch.setattr(fetch.socket, "getaddrinfo", answer)
    return asked


def test_a_name_that_means_a_private_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of several is enough; it is asked where the address stands in the list too, and looked up once: what the
    name means later does not count."""
    with serving(page()) as server:
        place = f"http://inside.org:{server.server_port}/"
        hosts = [f"inside.org:{server.server_port}"]
        resolved(monkeypatch, "93.184.216.34", "127.0.0.1")
        with pytest.raises(Refused, match=r"inside.org means the address 127.0.0.1, which is not of the public"):
            Fetcher(hosts).get(place, 5.0)
        assert server.asked == []
        asked = resolved(monkeypatch, "127.0.0.1")
        assert Fetcher([*hosts, "127.0.0.0/8"]).get(place, 5.0).content == b"<p>hello"
    assert asked == ["inside.org"] and server.asked[0][1]["Host"] == f"inside.org:{server.server_port}"


def test_redirects_are_followed_within_the_list_alone() -> None:
    def answer(handler: BaseHTTPRequestHandler, _: Any) -> None:
        steps = {
            "/x": "/y",
            "/y": "z?a=1",
            "/out": f"http://localhost:{other.server_port}/",
            "/file": "file:///etc/passwd",
        }
        target = steps.get(handler.path)
        reply(handler, 302 if target else 200, b"here", **({"Location": target} if target else {}))

    with serving(page()) as other, serving(answer) as server:
        found = get(server)
        assert (found.url, found.content) == (f"http://127.0.0.1:{server.server_port}/z?a=1", b"here")
        with pytest.raises(Refused, match=f"the host localhost:{other.server_port} is not allowed; allowed: 127"):
            get(server, "/out")
        with pytest.raises(Refused, match="is no URL of http or https"):
            get(server, "/file")
        with pytest.raises(ServerFault, match="more than 1 redirects"):
            get(server, max_redirects=1)
    assert other.asked == []


def test_a_loop_ends() -> None:
    with serving(page(b"", 307, Location="/x")) as server, pytest.raises(ServerFault, match="more than 5 redirects"):
        get(server)
    assert len(server.asked) == 6


def test_a_token_goes_to_the_first_place_alone() -> None:
    def answer(handler: BaseHTTPRequestHandler, _: Any) -> None:
        away = handler.path == "/x"
        reply(handler, 301 if away else 200, b"", **({"Location": "/y"} if away else {}))

    with serving(answer) as server:
        place = f"127.0.0.1:{server.server_port}"
        Fetcher([place]).get(f"http://{place}/x", 5.0, token="secret")
    assert [headers.get("Authorization") for _, headers, _ in server.asked] == ["Bearer secret", None]


def endless(handler: BaseHTTPRequestHandler, _: Any) -> None:
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b"x" * 65536)


def slow(handler: BaseHTTPRequestHandler, _: Any) -> None:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(200):
        handler.wfile.write(b"x")
        handler.wfile.flush()
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (endless, "answers with more than 1000 bytes"),
        (page(b"x" * 1001), "answers with more than 1000 bytes"),
        (page(gzip.compress(b"0" * 900_000), Content_Encoding="gzip"), "holds more than 1000 bytes"),
        (page(zlib.compress(b"0" * 90_000), Content_Encoding="deflate"), "holds more than 1000 bytes"),
        (page(gzip.compress(b"text")[:-6], Content_Encoding="gzip"), "gzip that is cut short"),
        (page(b"text", Content_Encoding="gzip"), "broken gzip"),
        (page(b"text", Content_Encoding="br"), "in the encoding 'br', which was not asked for"),
        (page(b"", Content_Length="50"), "the connection ended within an answer"),
        (page(b"gone", 404), "status 404"),
        (page(b"moved", 302), "status 302"),  # to nowhere
        (lambda handler, _: handler.wfile.write(b"SSH-2.0\r\n"), "BadStatusLine|SSH"),
        (lambda handler, _: handler.wfile.write(b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 200), "100 headers"),
    ],
)
def test_hostile_answers(answer: Callable, reason: str) -> None:
    with serving(answer) as server, pytest.raises(ServerFault, match=reason):
        get(server, max_bytes=1000)


def test_a_server_that_drips_ends_at_the_deadline() -> None:
    start = time.monotonic()
    with serving(slow) as server, pytest.raises(ServerFault, match="no whole answer until the deadline"):
        get(server, deadline_s=0.3)
    assert time.monotonic() - start < 3


def test_what_is_packed_is_unpacked_up_to_the_bound() -> None:
    with serving(page(gzip.compress(b"x" * 1000), Content_Encoding="gzip")) as server:
        assert get(server, max_bytes=1000).content == b"x" * 1000


def test_nobody_listens_and_nobody_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ServerFault, match="refused"):
        Fetcher([place]).get(f"http://{place}/", 5.0)

    def unknown(*_: Any, **__: Any) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(fetch.socket, "getaddrinfo", unknown)
    with pytest.raises(ServerFault, match=r"the host gone.org is not known"):
        Fetcher(["gone.org"]).get("http://gone.org/", 5.0)
