"""Asks servers over HTTP: JSON there and back, in bounded time and memory, with the standard library alone."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import time
from collections.abc import Iterator
from threading import Timer
from typing import Any, NamedTuple
from urllib.parse import SplitResult, urlsplit

AGAIN = (429, 503)  # busy, or not ready yet
FIRST_WAIT_S, LONGEST_WAIT_S = 0.25, 5.0  # before the second try, doubled from try to try
SHOWN_CHARACTERS = 300  # of what a server says of a failure


class Answer(NamedTuple):
    """Holds what a server answered: the body as it came, and the headers by their names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes


class ServerFault(OSError):
    """Says what a server did wrong, or that it did not answer in time."""


class Dropped(Exception):
    """Says that a connection was not made, or ended before the answer was whole: worth another try."""


def post_json(
    url: str, body: object, token: str | None, max_bytes: int, deadline: float, again: bool = True, up: bool = False
) -> Any:
    """Returns the JSON that a server answers to `body`.

    Tries again, at growing intervals, when the connection fails or the server says that it is busy (429, 503), until
    `deadline` (of time.monotonic); without `again` once only, and with `up` not where nothing listens. Redirects are
    not followed, and proxies of the environment not asked. Raises ServerFault, without the token, for every other
    status, an answer of more than `max_bytes`, or one that is no JSON.
    """
    data, wait_s = json.dumps(body).encode(), FIRST_WAIT_S
    while True:
        try:
            status, _, answer = exchange("POST", urlsplit(url), data, _headers(token), max_bytes, deadline)
            if status not in AGAIN:
                return _parsed(url, status, answer, token)
            reason = f"status {status}, {_shown(answer, token)}"
        except Dropped as error:
            reason = str(error)
            if up and isinstance(error.__cause__, ConnectionRefusedError):
                raise ServerFault(f"{url}: nothing listens there; start the server first, or correct it") from error
        if not again:
            raise ServerFault(f"{url}: no answer: {reason}")
        if time.monotonic() + wait_s >= deadline:
            raise ServerFault(f"{url}: no answer until the deadline, last: {reason}")
        time.sleep(wait_s)
        wait_s = min(2 * wait_s, LONGEST_WAIT_S)


def post_lines(url: str, body: object, token: str | None, max_bytes: int, deadline: float) -> Iterator[bytes]:
    """Yields the lines that a server answers to `body`, each as it comes, of at most `max_bytes`; who has enough closes
    the iterator, and the connection with it.

    Tries once. Raises ServerFault as `post_json` does, and when the connection fails.
    """
    try:
        with _translated(url, deadline), _connected(urlsplit(url), deadline) as connection:
            response = _response(connection, "POST", urlsplit(url), json.dumps(body).encode(), _headers(token))
            if response.status != 200:
                answer = response.read(SHOWN_CHARACTERS)
                raise ServerFault(f"{url}: status {response.status}, {_shown(answer, token)}")
            while line := response.readline(max_bytes + 1):
                if len(line) > max_bytes:
                    raise ServerFault(f"{url}: answers with a line of more than {max_bytes} bytes")
                yield line
        if time.monotonic() >= deadline:  # what was shut looks like an answer that ends
            raise ServerFault(f"{url}: no whole answer until the deadline")
    except Dropped as error:
        raise ServerFault(f"{url}: no whole answer: {error}") from error


def _headers(token: str | None) -> dict[str, str]:
    """Returns the headers of a request with JSON."""
    return {"Content-Type": "application/json"} | ({} if token is None else {"Authorization": f"Bearer {token}"})


def _response(
    connection: http.client.HTTPConnection, method: str, url: SplitResult, data: bytes | None, headers: dict[str, str]
) -> http.client.HTTPResponse:
    """Returns the answer to a request, of which nothing but the head is read yet."""
    target = (url.path or "/") + (f"?{url.query}" if url.query else "")
    connection.request(method, target, data, {**headers, "Connection": "close"})
    return connection.getresponse()


@contextlib.contextmanager
def _translated(where: str, deadline: float) -> Iterator[None]:
    """Raises Dropped where the connection fails within the block, ServerFault where anything else of it does."""
    try:
        yield
    except ServerFault:
        raise
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, TimeoutError) or time.monotonic() >= deadline:
            raise ServerFault(f"{where}: no answer until the deadline") from error
        if isinstance(error, ConnectionError | http.client.IncompleteRead):
            raise Dropped(str(error) or repr(error)) from error
        raise ServerFault(f"{where}: {error or repr(error)}") from error


def exchange(
    method: str,
    url: SplitResult,
    data: bytes | None,
    headers: dict[str, str],
    max_bytes: int,
    deadline: float,
    address: str | None = None,
) -> Answer:
    """Returns the answer to one request, whatever its status. With `address` the connection goes there, and not to
    what the name of the host means by then.

    Raises Dropped when the connection fails, ServerFault when anything else does.
    """
    where = url.geturl()
    with _translated(where, deadline), _connected(url, deadline, address) as connection:
        response = _response(connection, method, url, data, headers)
        answer = response.read(max_bytes + 1)
        whole = not response.length or len(answer) > max_bytes
    if time.monotonic() >= deadline:  # what was shut looks like an answer that ends
        raise ServerFault(f"{where}: no whole answer until the deadline")
    if len(answer) > max_bytes:
        raise ServerFault(f"{where}: answers with more than {max_bytes} bytes, which nothing that was asked needs")
    if not whole:
        raise Dropped("the connection ended within an answer")
    return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, answer)


@contextlib.contextmanager
def _connected(url: SplitResult, deadline: float, address: str | None = None) -> Iterator[http.client.HTTPConnection]:
    """Connects, and shuts the connection at the deadline: a server that sends a byte now and then never runs into the
    timeout of a socket."""
    kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
    left_s = deadline - time.monotonic()
    if left_s <= 0:
        raise TimeoutError
    connection = kind(url.hostname or "", url.port, timeout=left_s)
    if address is not None:  # the certificate is still that of the host
        connection._create_connection = lambda place, *rest: socket.create_connection((address, place[1]), *rest)
    connection.connect()
    timer = Timer(max(0.0, deadline - time.monotonic()), _shut, (connection.sock,))
    timer.daemon = True
    timer.start()
    try:
        yield connection
    finally:
        timer.cancel()
        connection.close()


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it has ended by itself
        sock.shutdown(socket.SHUT_RDWR)


def _parsed(url: str, status: int, answer: bytes, token: str | None) -> Any:
    """Returns the JSON of an answer. Raises ServerFault for one that says of itself that it is none."""
    if 300 <= status < 400:
        raise ServerFault(f"{url}: status {status}, redirects are not followed; give the URL that it leads to")
    if status != 200:
        raise ServerFault(f"{url}: status {status}, {_shown(answer, token)}")
    try:
        return json.loads(answer)
    except (ValueError, RecursionError) as error:
        raise ServerFault(f"{url}: answers with what is no JSON: {_shown(answer, token)}") from error


def _shown(answer: bytes, token: str | None) -> str:
    """Returns the beginning of an answer in one line, for people; it may hold what was sent, but never the token."""
    text = " ".join(answer.decode(errors="replace").split())
    text = text.replace(token, "***") if token else text
    return "".join(c if c.isprintable() else "?" for c in text[:SHOWN_CHARACTERS]) or "without a word"
