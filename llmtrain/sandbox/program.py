"""Runs a whole Python program as a call: what code rewards and tools need."""

from __future__ import annotations

import bz2  # noqa: F401  this and the others use libraries of the system, which a call cannot load
import contextlib
import decimal  # noqa: F401
import hashlib  # noqa: F401
import io
import lzma  # noqa: F401
import sqlite3  # noqa: F401
import sys
import traceback
from typing import Any

MOST_CHARACTERS = 65536  # of the output that is kept


class Output(io.TextIOBase):
    """Keeps the first part of what is printed."""

    def __init__(self) -> None:
        self.text = ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.text += text[: MOST_CHARACTERS - len(self.text)]
        return len(text)


def run(source: str, stdin: str = "") -> dict[str, Any]:
    """Returns {"output": what the program printed, "error": the last line of its traceback or None, "ended": whether it
    reached its end}.

    SystemExit with code 0 or None is no error, but no end either.
    """
    output, error, ended = Output(), None, False
    sys.stdin = io.StringIO(stdin)
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            exec(compile(source, "program.py", "exec"), {"__name__": "__main__"})
            ended = True
        except SystemExit as told:
            error = f"SystemExit: {told.code}" if told.code else None
        except BaseException as raised:
            error = traceback.format_exception_only(raised)[-1].strip()
    return {"output": output.text, "error": error, "ended": ended}
