"""Requests against servers that are slow, broken or hostile: each ends in time, with words."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest

from llmtrain.data import post
from llmtrain.data.post import ServerFault, post_json, post_lines
from tests.servers import reply, serving

OK = b'{"a": [1, null]}'


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(post, "FIRST_WAIT_S", 0.02)


def ask(url: str, token: str | None = None, max_bytes: int = 1000, deadline_s: float = 5.0, body: Any = None) -> Any:
    return post_json(f"{url}/x", body, token, max_bytes, time.monotonic() + deadline_s)


def statuses(*codes: int) -> Callable[[BaseHTTPRequestHandler, Any], None]:
    """Answers with these statuses one after the other, then with 200."""
    left: Iterator[int] = iter(codes)

    def answer(handler: BaseHTTPRequestHandler, body: Any) -> None:
        status = next(left, 200)
        reply(handler, status, OK if status == 200 else b"<html>\n<h1>not now, secret</h1>")

    return answer


def test_json_there_and_back_with_the_token_in_its_header() -> None:
    with serving(statuses()) as server:
        assert ask(server.url, body={"b": [1.5]}, token="secret") == {"a": [1, None]}
        assert ask(server.url) == {"a": [1, None]}
    (path, headers, body), (_, without, _) = server.asked
    assert (path, headers["Authorization"], body) == ("/v1/x", "Bearer secret", {"b": [1.5]})
    assert "Authorization" not in without and headers["Content-Type"] == "application/json"


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again_until_the_deadline(status: int) -> None:
    with serving(statuses(status, status)) as server:
        assert ask(server.url) == {"a": [1, None]} and len(server.asked) == 3
    with (
        serving(statuses(*[status] * 1000)) as server,
        # "whole": the deadline fell into an answer, as it may where other work delays both
        pytest.raises(ServerFault, match=r"no (whole )?answer until the deadl"),
    ):
        start = time.monotonic()
        ask(server.url, deadline_s=0.5)
    assert time.monotonic() - start < 2 and len(server.asked) > 2


@pytest.mark.parametrize("status", [400, 401, 404, 500, 502])
def test_every_other_status_ends_it_at_once(status: int) -> None:
    """With the beginning of the page in one line, and without the token that it holds."""
    with serving(statuses(status)) as server, pytest.raises(ServerFault) as found:
        ask(server.url, token="secret")
    assert str(found.value) == f"{server.url}/x: status {status}, <html> <h1>not now, ***</h1>"
    assert len(server.asked) == 1


def test_redirects_are_not_followed() -> None:
    with (
        serving(statuses()) as other,
        serving(lambda h, _: reply(h, 307, b"", Location=f"{other.url}/x")) as server,
        pytest.raises(ServerFault, match=r"status 307, redirects are not followed; give the URL"),
    ):
        ask(server.url, token="secret")
    assert other.asked == []


def test_nobody_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    start = time.monotonic()
    with pytest.raises(ServerFault, match=r"no (whole )?answer until the deadline, last: .*[Rr]efused"):
        ask(url, deadline_s=0.4)
    assert 0.2 < time.monotonic() - start < 2


def test_a_server_that_comes_up_late_is_waited_for() -> None:
    dropped = []

    def answer(handler: BaseHTTPRequestHandler, body: Any) -> None:
        if len(dropped) < 2:  # the connection ends before and within an answer
            dropped.append(len(dropped))
            if dropped[-1]:
                handler.send_response(200)
                handler.send_header("Content-Length", str(len(OK)))
                handler.end_headers()
                handler.wfile.write(OK[:5])
            return
        reply(handler, 200, OK)

    with serving(answer) as server:
        assert ask(server.url) == {"a": [1, None]} and len(server.asked) == 3


@pytest.mark.parametrize("sent", ["nothing", "status", "headers", "body"])
def test_a_server_that_hangs_or_drips_ends_at_the_deadline(sent: str) -> None:
    """A byte every twentieth of a second: no single wait is long."""
    pieces = {"nothing": b"", "status": b"HTTP/1.1 200 OK" * 9, "headers": b"X-A: b\r\n" * 20, "body": b" " * 90}

    def answer(handler: BaseHTTPRequestHandler, body: Any) -> None:
        start = b"" if sent in ("nothing", "status") else b"HTTP/1.1 200 OK\r\n"
        handler.wfile.write(start + (b"Content-Length: 100\r\n\r\n" if sent == "body" else b""))
        for i in range(len(pieces[sent])):
            handler.wfile.write(pieces[sent][i : i + 1])
            time.sleep(0.05)
        time.sleep(3 if sent == "nothing" else 0)

    with serving(answer) as server, pytest.raises(ServerFault, match="until the deadline"):
        start = time.monotonic()
        ask(server.url, deadline_s=0.5)
    assert 0.4 < time.monotonic() - start < 2 and len(server.asked) == 1


@pytest.mark.parametrize("chunked", [False, True])
def test_an_answer_is_bounded(chunked: bool) -> None:
    sent = []

    def answer(handler: BaseHTTPRequestHandler, body: Any) -> None:
        handler.send_response(200)
        handler.send_header(*(("Transfer-Encoding", "chunked") if chunked else ("Content-Length", str(10**12))))
        handler.end_headers()
        piece = b" " * 65536
        for _ in range(10_000):
            sent.append(handler.wfile.write(b"10000\r\n" + piece + b"\r\n" if chunked else piece))

    with serving(answer) as server, pytest.raises(ServerFault, match="answers with more than 1000 bytes"):
        ask(server.url)
    assert len(sent) < 1000


@pytest.mark.parametrize("data", [b"<html>", b"", b"\xff\xfe", b"[" * 100_000, b"1" * 5000])
def test_what_is_no_json(data: bytes) -> None:
    with (
        serving(lambda h, _: reply(h, 200, data)) as server,
        pytest.raises(ServerFault, match="with what is no JSON: "),
    ):
        ask(server.url, max_bytes=1_000_000)


def test_what_is_no_http_and_what_is_no_name() -> None:
    with (
        serving(lambda h, _: h.wfile.write(b"SSH-2.0-x\r\n" * 3)) as server,
        pytest.raises(ServerFault, match=r"/v1/x: .*SSH"),
    ):
        ask(server.url)
    with pytest.raises(ServerFault, match=r"no-such-host\.invalid"):
        ask("http://no-such-host.invalid")
    with pytest.raises(ServerFault, match="no answer until the deadline"):
        ask("http://127.0.0.1", deadline_s=-1)


def test_a_body_that_is_sent_is_json() -> None:
    with serving(lambda h, body: reply(h, 200, json.dumps(body).encode())) as server:
        assert ask(server.url, body={"text": "naïve 数"}) == {"text": "naïve 数"}


def lines(url: str, max_bytes: int = 1000, deadline_s: float = 5.0) -> Iterator[bytes]:
    return post_lines(f"{url}/x?tags=a", {"b": 1}, "secret", max_bytes, time.monotonic() + deadline_s)


def dripping(*parts: bytes, wait_s: float = 0.0) -> Callable[[BaseHTTPRequestHandler, Any], None]:
    """Sends these parts, with a pause behind each, and ends the connection."""

    def answer(handler: BaseHTTPRequestHandler, body: Any) -> None:
        handler.send_response(200)
        handler.end_headers()
        for part in parts:
            handler.wfile.write(part)
            time.sleep(wait_s)

    return answer


def test_lines_come_one_by_one_and_the_query_is_sent() -> None:
    with serving(dripping(b"a\n", b"b", b"c\n\n", b"d")) as server:
        assert list(lines(server.url)) == [b"a\n", b"bc\n", b"\n", b"d"]
    ((path, headers, body),) = server.asked
    assert (path, headers["Authorization"], body) == ("/v1/x?tags=a", "Bearer secret", {"b": 1})


def test_whoever_has_enough_lines_hangs_up() -> None:
    with serving(dripping(*[b"a\n"] * 1000, wait_s=0.01)) as server:
        start, found = time.monotonic(), lines(server.url)
        assert next(found) == b"a\n"
        found.close()
        assert time.monotonic() - start < 2


def test_lines_that_are_too_long_too_late_or_refused() -> None:
    with serving(dripping(b"a" * 1001)) as server, pytest.raises(ServerFault, match="a line of more than 1000 bytes"):
        list(lines(server.url))
    with (
        serving(dripping(*[b"a\n"] * 1000, wait_s=0.01)) as server,
        pytest.raises(ServerFault, match="until the deadline"),
    ):
        list(lines(server.url, deadline_s=0.3))
    with serving(statuses(500)) as server, pytest.raises(ServerFault, match=r"status 500, .*not now, \*\*\*"):
        list(lines(server.url))
    assert len(server.asked) == 1


def test_without_again_a_server_is_asked_once() -> None:
    with serving(statuses(503, 503)) as server, pytest.raises(ServerFault, match=r"no answer: status 503"):
        post_json(f"{server.url}/x", None, None, 1000, time.monotonic() + 5, again=False)
    assert len(server.asked) == 1
