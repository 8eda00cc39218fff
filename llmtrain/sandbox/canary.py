"""Tries at the start of every worker whether its lock holds: some things that must fail are done."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable

HELD = '{"value": []}'  # the reply of `escapes` in a sandbox that holds


def escapes(readable: list[str]) -> list[str]:
    """Returns which of the forbidden things worked."""
    attempts: dict[str, Callable[[], object]] = {
        "reading /etc/passwd": lambda: open("/etc/passwd", encoding="utf-8").close(),
        "listing /proc": lambda: os.listdir("/proc"),
        "writing beside Python's libraries": lambda: os.mkdir(f"{readable[0]}/llmtrain-canary"),
        "opening a socket": lambda: socket.socket().close(),
        "signalling the parent": lambda: os.kill(os.getppid() or -1, 0),
        "starting a process": _fork,
    }
    return [name for name, attempt in attempts.items() if _works(attempt)]


def _fork() -> None:
    if os.fork() == 0:
        os._exit(0)


def _works(attempt: Callable[[], object]) -> bool:
    with contextlib.suppress(OSError):
        attempt()
        return True
    return False
