"""Provides HTTP servers on this machine whose answers a test decides."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[BaseHTTPRequestHandler, Any], object]
"""Answers a request whose body is given, parsed."""


class Server(ThreadingHTTPServer):
    """Answers by a function, and keeps what it was asked: (path, headers, body) each."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, answer: Answer) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.asked = answer, []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, dict(self.headers), body))
        with suppress(BrokenPipeError, ConnectionResetError):  # the client had enough
            self.server.answer(self, body)

    def do_GET(self) -> None:
        self.server.asked.append((self.path, dict(self.headers), None))
        with suppress(BrokenPipeError, ConnectionResetError):
            self.server.answer(self, None)

    def log_message(self, *args: Any) -> None:
        """Says nothing."""


def reply(handler: BaseHTTPRequestHandler, status: int, data: bytes | Any, **headers: str) -> None:
    """Sends a whole answer: bytes as they are, everything else as JSON."""
    data = data if isinstance(data, bytes) else json.dumps(data).encode()
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(data)), **headers}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(data)


@contextmanager
def serving(answer: Answer) -> Iterator[Server]:
    """Provides a server in a thread of its own."""
    server = Server(answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
