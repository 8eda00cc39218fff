"""Messages over a pair of sockets, whole or cut."""

from __future__ import annotations

import os
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Iterator

import pytest

from llmtrain.rollout.channel import Cut, receive, send

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    a, b = socket.socketpair()
    with a, b:
        yield a, b


def soon() -> float:
    return time.monotonic() + 0.1


def test_a_message_comes_as_it_was(pair: Pair) -> None:
    a, b = pair
    data = os.urandom(1_000_000)  # more than a socket holds
    thread = threading.Thread(target=send, args=(a, {"kind": "x", "n": [1, "ü"]}, data))
    thread.start()
    message = receive(b, time.monotonic() + 10)
    thread.join()
    assert (message.head, bytes(message.payload), message.file) == ({"kind": "x", "n": [1, "ü"]}, data, None)


def test_messages_stay_apart(pair: Pair) -> None:
    a, b = pair
    for number in range(3):
        send(a, {"n": number}, b"p" * number)
    assert [(m.head["n"], len(m.payload)) for m in (receive(b), receive(b), receive(b))] == [(0, 0), (1, 1), (2, 2)]


def test_an_open_file_goes_along(pair: Pair) -> None:
    a, b = pair
    with tempfile.TemporaryFile() as file:
        file.write(b"inside")
        file.flush()
        send(a, {"kind": "weights"}, file=file.fileno())
    message = receive(b)
    assert os.pread(message.file, 6, 0) == b"inside" and not os.get_inheritable(message.file)
    os.close(message.file)


def test_the_end_between_messages_is_none(pair: Pair) -> None:
    a, b = pair
    send(a, {"n": 1})
    a.close()
    assert receive(b).head == {"n": 1}
    assert receive(b) is None


@pytest.mark.parametrize("part", [b"\x05", struct.pack("<QQ", 9, 0), struct.pack("<QQ", 2, 9) + b"{}abc"])
def test_an_end_within_a_message_is_told(pair: Pair, part: bytes) -> None:
    a, b = pair
    a.sendall(part)
    a.close()
    with pytest.raises(Cut, match="the connection ended within a message"):
        receive(b)


@pytest.mark.parametrize("part", [b"", b"\x05", struct.pack("<QQ", 2, 9) + b"{}abc"])
def test_the_deadline_is_that_of_the_whole_message(pair: Pair, part: bytes) -> None:
    a, b = pair
    a.sendall(part)
    with pytest.raises(Cut, match="took or sent nothing in time"):
        receive(b, soon())


def test_who_takes_nothing_is_not_waited_for(pair: Pair) -> None:
    a, _ = pair
    began = time.monotonic()
    with pytest.raises(Cut, match="took or sent nothing in time"):
        send(a, {"kind": "x"}, bytes(10_000_000), deadline=soon())
    assert time.monotonic() - began < 2


def test_who_is_gone_takes_nothing(pair: Pair) -> None:
    a, b = pair
    b.close()
    with pytest.raises(Cut, match=r"^the connection ended$"):
        send(a, {"kind": "x"})
