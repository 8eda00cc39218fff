"""Exchanges messages with a process of this machine over a pair of sockets: JSON, bytes behind it, and an open file. No
pickle, and nothing that listens: the pair is inherited, so nobody else can connect."""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from dataclasses import dataclass
from typing import Any

HEAD = struct.Struct("<QQ")  # bytes of the JSON, bytes behind it


class Cut(ConnectionError):
    """Says that the other side is gone, or does not take or send what it should in time."""


@dataclass(frozen=True)
class Message:
    """Holds one message. Example: Message({"kind": "generate"}, b"", None)"""

    head: dict[str, Any]
    payload: bytearray
    file: int | None  # descriptor; the receiver closes it


def send(
    sock: socket.socket,
    head: dict[str, Any],
    payload: bytes | memoryview = b"",
    file: int | None = None,
    deadline: float | None = None,
) -> None:
    """Sends a message. Raises Cut when the other side has closed, or has not taken it whole by `deadline` (of
    time.monotonic; None = wait for ever)."""
    text = json.dumps(head).encode()
    try:
        _allow(sock, deadline)
        socket.send_fds(sock, [HEAD.pack(len(text), len(payload))], [] if file is None else [file])
        for part in (text, payload):
            _allow(sock, deadline)
            sock.sendall(part)  # within one timeout, however many parts it takes
    except OSError as error:
        raise Cut(_words(error)) from error


def receive(sock: socket.socket, deadline: float | None = None) -> Message | None:
    """Returns the next message; None when the other side has closed between two. Raises Cut when it closes within one,
    or has not sent it whole by `deadline` (of time.monotonic; None = wait for ever)."""
    try:
        _allow(sock, deadline)
        begun, files, _, _ = socket.recv_fds(sock, HEAD.size, 1)
        for file in files:
            os.set_inheritable(file, False)
        if not begun:
            return None
        text_bytes, payload_bytes = HEAD.unpack(begun + _read(sock, HEAD.size - len(begun), deadline))
        head = json.loads(_read(sock, text_bytes, deadline))
        return Message(head, _read(sock, payload_bytes, deadline), files[0] if files else None)
    except OSError as error:
        raise Cut(_words(error)) from error


def _read(sock: socket.socket, count: int, deadline: float | None) -> bytearray:
    found, at = bytearray(count), 0
    while at < count:
        _allow(sock, deadline)
        got = sock.recv_into(memoryview(found)[at:])
        if not got:
            raise Cut("the connection ended within a message")
        at += got
    return found


def _allow(sock: socket.socket, deadline: float | None) -> None:
    """Lets the next call on the socket wait until the deadline."""
    sock.settimeout(None if deadline is None else max(1e-3, deadline - time.monotonic()))


def _words(error: OSError) -> str:
    if isinstance(error, Cut):
        return str(error)
    if isinstance(error, ConnectionError):
        return "the connection ended"
    return "took or sent nothing in time" if isinstance(error, TimeoutError) else str(error)
