"""Starts a process that samples, and asks it: the trainer's side. Every wait has a deadline, every fault a name."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtrain.rollout.channel import Cut, Message, receive, send
from llmtrain.rollout.checksums import differing
from llmtrain.rollout.shared_weights import Shared

POLL_S = 0.05  # between looks for newer weights while a worker samples
TAIL_BYTES = 1500  # of a worker's log, in a message


class WorkerFault(RuntimeError):
    """Says what is wrong with a worker; another can do its work."""


@dataclass(frozen=True)
class Program:
    """Says what is started, and how it is told what to do.

    Example: Program([sys.executable, "-m", "llmtrain.rollout.worker_process"], settings, "run", deadline_s=600)
    """

    command: Sequence[str]  # gets the descriptor of its socket and the id of this process as arguments
    settings: Mapping[int, dict[str, Any]]  # for each worker that is started here, by its number, as JSON
    directory: str  # where the logs of the workers lie
    deadline_s: float  # to start, to take weights, to answer a request


class Worker:
    """Holds one process. Whoever starts it, kills it; a thread that ends without that takes the process with it."""

    def __init__(self, program: Program, index: int, look: Callable[[], Shared | None]) -> None:
        """Starts the process and waits until it is ready. Raises WorkerFault.

        `look` is called again and again while something is waited for: it returns the newest weights, and may raise to
        end the wait.
        """
        self.name, self.deadline_s, self.look = f"rollout worker {index}", program.deadline_s, look
        self.log = Path(program.directory, f"rollout-worker-{index}.log")
        self.sent: int | None = None  # version of the weights that were sent last
        self.checksums: deque[dict[str, str] | None] = deque()  # of weights that were sent and not yet loaded, in order
        self.held: int | None = None  # version that it has loaded
        self.load_s, self.loaded_bytes = 0.0, 0  # of all weights that it has loaded
        self.sock, other = socket.socketpair()
        with other, open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [*program.command, str(other.fileno()), str(os.getpid())],
                pass_fds=[other.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a signal to the job reaches the trainers, which save first
            )
        try:
            self.ask(program.settings[index])
        except BaseException:
            self.kill()
            raise

    def ask(self, head: dict[str, Any], renew: bool = False) -> Message:
        """Returns the answer to a request. Raises WorkerFault, with the end of the log, when there is none within the
        deadline. With `renew` the newest weights are sent while it is waited for, and the answer goes on with them."""
        deadline = time.monotonic() + self.deadline_s
        try:
            send(self.sock, head, deadline=deadline)
            while (message := self._received(deadline, POLL_S)) is None:
                if time.monotonic() >= deadline:
                    raise Cut(f"no answer within {self.deadline_s:g} s")
                weights = self.look()
                if renew and weights is not None and self.sent == self.held != weights.version:
                    self.give(weights)
            return message
        except Cut as error:
            raise self.fault(f"{head['kind']}: {error}") from error

    def watch(self) -> None:
        """Raises WorkerFault when the process, of which nothing is waited for, is gone."""
        try:
            if self._received(time.monotonic() + self.deadline_s, 0.0) is not None:
                raise Cut("an answer that nobody asked for")
        except Cut as error:
            raise self.fault(f"idle: {error}") from error

    def give(self, weights: Shared) -> None:
        """Sends weights, without waiting until they are loaded. Raises WorkerFault."""
        try:
            send(self.sock, weights.head(), file=weights.file, deadline=time.monotonic() + self.deadline_s)
        except Cut as error:
            raise self.fault(f"weights: {error}") from error
        self.sent = weights.version
        self.checksums.append(weights.checksums)

    def fault(self, reason: str) -> WorkerFault:
        """Returns a fault of this worker, with how it ended and the end of its log."""
        with contextlib.suppress(subprocess.TimeoutExpired):  # a connection ends just before its process
            self.process.wait(0.2)
        code = self.process.poll()
        ended = "" if code is None else f" (it ended {ending(code)})"
        tail = last_bytes(self.log, TAIL_BYTES).decode(errors="replace").strip()
        return WorkerFault(f"{self.name}: {reason}{ended}" + (f"; the end of {self.log}:\n{tail}" if tail else ""))

    def kill(self) -> None:
        """Ends the process at once."""
        self.sock.close()
        self.process.kill()
        self.process.wait()

    def _received(self, deadline: float, wait_s: float) -> Message | None:
        """Returns an answer if one comes; notes by the way which weights are loaded."""
        if not select.select([self.sock], [], [], wait_s)[0]:
            return None
        message = receive(self.sock, deadline)
        if message is None:
            raise Cut("the connection ended")
        if message.head["kind"] != "loaded":
            return message
        if not self.checksums:
            raise Cut("has loaded weights that nobody sent")
        sums = self.checksums.popleft()
        if sums is not None and (wrong := differing(sums, message.head["checksums"])):
            raise Cut(f"does not hold the weights that were sent (rollout.verify), first in {wrong[0]} of {len(wrong)}")
        self.held = message.head["version"]
        self.load_s += message.head["load_s"]
        self.loaded_bytes += message.head["bytes"]
        return None


def last_bytes(path: Path, count: int) -> bytes:
    """Returns the end of a file, so many bytes at most."""
    with open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - count))
        return file.read()


def ending(code: int) -> str:
    """Returns how a process ended, from its return code. Example: ending(-9) is "by SIGKILL"."""
    return f"by {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
