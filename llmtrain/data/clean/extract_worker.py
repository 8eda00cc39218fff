"""Runs by itself, as a script: takes pages from a pipe and gives back their main text, until the pipe is closed.

Its arguments are the pipe's file descriptor, the most bytes of address space, and trafilatura's options as JSON. An
answer is one byte, "t" for a text or "f" for an error of the library, and what is said. Where the memory does not
suffice, the process ends.
"""

from __future__ import annotations

import json
import resource
import sys
from multiprocessing.connection import Connection


def serve(pipe: Connection, options: dict) -> None:
    """Answers every page; returns when the other end is closed."""
    from trafilatura import extract

    extract("<p>", **options)  # loads what is loaded on first use
    pipe.send_bytes(b"r")
    while True:
        try:
            page = pipe.recv_bytes()
        except EOFError:
            return
        pipe.send_bytes(answer(page.decode("utf-8", "surrogatepass"), extract, options))


def answer(page: str, extract: callable, options: dict) -> bytes:
    """Returns the text of a page, or the error that the library raised."""
    try:
        return b"t" + (extract(page, **options) or "").encode("utf-8", "surrogatepass")
    except MemoryError:
        raise  # what is left of the process is not worth keeping
    except Exception as error:  # any page may meet any error of the libraries: it says nothing of the next one
        return b"f" + repr(error)[:200].encode("utf-8", "replace")


if __name__ == "__main__":
    limit_bytes = int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))
    serve(Connection(int(sys.argv[1])), json.loads(sys.argv[3]))
