"""Runs readers of formats that can hang or fill the memory in a process of their own, with limits on both.

The process is started once and serves file after file. It is ended when it takes too long, and started again.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from importlib import import_module
from multiprocessing.connection import Connection, Pipe
from typing import Any

from llmtrain.data.clean.read.items import BrokenError, Item, UnusableError

START_S = 60.0  # for the process to start, beside the time for an item


class Apart:
    """Holds the process. `timeout_s` is for one item, `memory_bytes` for all that the process holds."""

    def __init__(self, timeout_s: float, memory_bytes: int) -> None:
        self.timeout_s, self.memory_bytes = timeout_s, memory_bytes
        self.process: subprocess.Popen | None = None
        self.pipe: Connection | None = None

    def start(self) -> Connection:
        """Starts the process if none runs, and returns the pipe to it when it is ready."""
        if self.pipe is None:
            self.pipe, theirs = Pipe()
            command = [sys.executable, "-m", __name__, str(theirs.fileno()), str(self.memory_bytes)]
            environment = os.environ | {"ARROW_DEFAULT_MEMORY_POOL": "system"}  # Arrow's own reserves 1 GB at once
            descriptors = [theirs.fileno()]
            self.process = subprocess.Popen(command, pass_fds=descriptors, stdin=subprocess.DEVNULL, env=environment)
            theirs.close()
            if not self.pipe.poll(START_S) or not self.received(self.pipe):
                self.close()
                raise RuntimeError(f"the process that reads files did not start within {START_S} s")
        return self.pipe

    def items(self, function: str, *arguments: Any) -> Iterator[Item]:
        """Yields what the generator `module:function` of this package yields there. Raises BrokenError with the reason
        that it gives, or `timeout`, `out_of_memory`, `reader_died`."""
        pipe, done = self.start(), False
        pipe.send((function, arguments))
        try:
            while not done:
                if not pipe.poll(self.timeout_s):
                    raise BrokenError("timeout")
                said, value = self.received(pipe) or ("died", "reader_died")
                done = said in ("end", "broken")
                if said in ("broken", "died"):
                    raise BrokenError(value)
                if said == "item":
                    yield value
        finally:
            if not done:
                self.close()

    @staticmethod
    def received(pipe: Connection) -> tuple[str, Any] | None:
        """Returns what the process says, None when it has ended."""
        try:
            return pipe.recv()
        except (EOFError, ConnectionError):
            return None

    def close(self) -> None:
        """Ends the process."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.pipe.close()
            self.process = self.pipe = None


def serve(pipe: Connection) -> None:
    """Answers calls until the other end is closed."""
    pipe.send(("ready", None))
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        module, name = function.split(":")
        try:
            with closing(getattr(import_module(f"{__package__}.{module}"), name)(*arguments)) as items:
                for item in items:
                    pipe.send(("item", item))
            answer = ("end", None)
        except (UnusableError, BrokenError) as error:
            answer = ("broken", str(error))
        except MemoryError:
            answer = ("broken", "out_of_memory")
        except Exception:  # whatever a parser raises at a file that is broken
            answer = ("broken", f"{module}_broken")
        pipe.send(answer)


def limit(memory_bytes: int) -> None:
    """Limits what this process may hold, and silences what parsers log."""
    import logging
    import resource

    logging.disable()
    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    limit(int(sys.argv[2]))
    serve(Connection(int(sys.argv[1])))
