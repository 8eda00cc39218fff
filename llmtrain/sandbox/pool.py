"""Starts workers and hands them calls: the side of the process that wants something computed."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import json
import os
import selectors
import signal
import site
import subprocess
import sys
import sysconfig
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from llmtrain.sandbox.limits import Limits, Mechanisms

START = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from llmtrain.sandbox import server; "
    "server.own_channel(); server.main()"
)
START_ELSEWHERE = (  # of llmtrain an interpreter of its own finds this package alone, which needs nothing but Python
    "import sys, importlib.util as u; s = u.spec_from_file_location('llmtrain', sys.argv[1] + '/__init__.py', "
    "submodule_search_locations=[sys.argv[1]]); m = sys.modules['llmtrain'] = u.module_from_spec(s); "
    "s.loader.exec_module(m); from llmtrain.sandbox import server; server.own_channel(); server.main()"
)
PASSED_ON = ("HOME", "PATH", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "MPLCONFIGDIR", "XDG_CACHE_HOME")
ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL", "NUMEXPR")}
OURS = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))  # where the package llmtrain lies
START_S = 120.0  # to import what the functions need
GRACE_S = 30.0  # beyond a call's deadline, which the worker itself keeps; then the worker counts as broken


class Call(NamedTuple):
    """Asks for `function(*arguments)`; arguments and result are JSON values.

    Example: Call("score", ("42.", {"answer": "42"}), 5.0)
    """

    function: str
    arguments: tuple[Any, ...]
    deadline_s: float


class Reply(NamedTuple):
    """What came of a call: its value, or why there is none. Example: Reply(None, "took longer than 5 s")"""

    value: Any
    error: str | None


class Worker:
    """One process that has loaded some functions. Raises RuntimeError if it cannot start or its sandbox does not
    hold, ImportError if a function cannot be loaded."""

    def __init__(
        self,
        functions: Mapping[str, str],
        limits: Limits,
        sandboxed: bool = True,
        without: Sequence[str] = (),
        takes: Mapping[str, int] = MappingProxyType({}),
        made: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
        python: str | None = None,
        warm_up: Sequence[Any] = (),
    ) -> None:
        environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        self.sandboxed, self.give_up = sandboxed, 0.0
        here = [sys.executable, "-I", "-c", START, json.dumps(search_path())]
        self.process = subprocess.Popen(
            here if python is None else [python, "-I", "-c", START_ELSEWHERE, os.path.join(OURS, "llmtrain")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**(environment if sandboxed else os.environ), **ONE_THREAD, "PYTHONDONTWRITEBYTECODE": "1"},
            cwd="/" if sandboxed else None,
            start_new_session=True,
        )
        settings = {"functions": dict(functions), "sandboxed": sandboxed, "readable": library_folders()}
        settings |= {"limits": dataclasses.asdict(limits), "without": list(without)}
        settings |= {"takes": dict(takes), "made": dict(made), "warm_up": list(warm_up)}
        self.write(settings)

    def await_ready(self) -> Mechanisms:
        """Returns which mechanisms hold the calls, when everything is loaded."""
        give_up = time.monotonic() + START_S
        answer = self.read(START_S)
        if answer is not None and "ready" in answer:
            return Mechanisms(**answer["ready"])
        self.kill()
        if answer is None and time.monotonic() < give_up:
            raise ImportError("a worker ended while it imported the functions; they must not end the process")
        if answer is None:
            raise RuntimeError(f"a worker of the sandbox did not start in {START_S:.0f} s (see above); start it again")
        if answer.get("loading"):
            raise ImportError(answer["fault"])
        raise RuntimeError(f"no sandbox on this machine: {answer['fault']}; `llmtrain doctor` says what there is")

    def send(self, calls: Sequence[Call]) -> None:
        """Starts calls of one function."""
        self.give_up = time.monotonic() + len(calls) * calls[0].deadline_s + (GRACE_S if self.sandboxed else 0)
        arguments = [list(call.arguments) for call in calls]
        self.write({"function": calls[0].function, "calls": arguments, "deadline_s": calls[0].deadline_s})

    def patience_s(self) -> float:
        """Returns how much longer to wait for the replies to what was sent."""
        return self.give_up - time.monotonic()

    def receive(self) -> list[Reply] | None:
        """Returns the replies to the calls that were sent; None if the worker is broken."""
        answer = self.read(self.patience_s())
        if answer is None:
            return None
        return [Reply(None, f["fault"]) if "fault" in f else read_reply(f["reply"]) for f in answer["frames"]]

    def write(self, content: dict[str, Any]) -> None:
        """Writes a frame; a worker that is gone shows when it is read from."""
        body = json.dumps(content).encode()
        try:
            self.process.stdin.write(len(body).to_bytes(4, "little") + body)
            self.process.stdin.flush()
        except BrokenPipeError:
            pass

    def read(self, patience_s: float) -> dict[str, Any] | None:
        """Returns the next frame; None if the worker ends or nothing comes."""
        give_up = time.monotonic() + patience_s
        head = self._bytes(4, give_up)
        body = head and self._bytes(int.from_bytes(head, "little"), give_up)
        return json.loads(body) if body else None

    def _bytes(self, count: int, give_up: float) -> bytes | None:
        found, descriptor = b"", self.process.stdout.fileno()
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, selectors.EVENT_READ)
            while len(found) < count:
                ready = selector.select(max(give_up - time.monotonic(), 0))
                part = os.read(descriptor, count - len(found)) if ready else b""
                if not part:
                    return None
                found += part
        return found

    def kill(self) -> None:
        """Ends the worker and all that it started, its process group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):  # none of it is left
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        with contextlib.suppress(BrokenPipeError):  # of a frame that it no longer took
            self.process.stdin.close()
        self.process.stdout.close()


def read_reply(text: str) -> Reply:
    """Returns what a call wrote, which may be anything: it may have been taken over."""
    try:
        reply = json.loads(text)
    except (ValueError, RecursionError):
        return Reply(None, "its reply is not JSON")
    if isinstance(reply, dict) and isinstance(reply.get("error"), str):
        return Reply(None, printable(reply["error"][:300]))
    if isinstance(reply, dict) and reply.keys() == {"value"}:
        return Reply(reply["value"], None)
    return Reply(None, "its reply has another form")


def printable(text: str) -> str:
    """Returns a text that may go to a terminal and a file: control characters and halves of characters are left out."""
    return "".join(c if c.isprintable() else " " for c in text)


class Pool:
    """Workers with the same functions, started at the first calls. Usable from any thread, one at a time.

    Up to `batch` calls share a process, until one of them fails: for functions that never evaluate what they are given.
    `takes` says of names how many arguments the function must take; others are refused when a worker starts. `made`
    says of names that the function is what the one that is named returns for these keyword arguments, in each worker.
    `python` is another interpreter, for functions outside of the sandbox whose packages are installed there.
    A function named `warm_up` is called by each worker before all calls, in the process that they are forked from.

    Example: Pool({"score": "my_rewards.py:score"}).run([Call("score", ("42", {}), 5.0)]) -> [Reply(1.0, None)]
    """

    def __init__(
        self,
        functions: Mapping[str, str],
        workers: int = 1,
        limits: Limits | None = None,
        sandboxed: bool = True,
        without: Sequence[str] = (),
        batch: int = 1,
        takes: Mapping[str, int] = MappingProxyType({}),
        made: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
        python: str | None = None,
    ) -> None:
        """Raises ValueError for another interpreter with a sandbox, which knows the libraries of this one."""
        if sandboxed and python is not None:
            raise ValueError(f"{python}: another interpreter has no sandbox; run it outside")
        self.batch = batch
        self.functions, self.warm_up = dict(functions), ()
        self.arguments = (functions, limits or Limits(), sandboxed, without, takes, made, python)
        self.size, self.workers, self.mechanisms = workers, deque[Worker](), Mechanisms()
        self.lock = threading.Lock()
        atexit.register(self.close)

    def start(self, warm_up: Sequence[Any] = ()) -> None:
        """Starts the workers that are missing. Raises as Worker does.

        `warm_up` are the arguments of the function of that name, which every worker calls once before any call; where
        they differ from those of running workers, these are replaced.
        """
        with self.lock:
            if warm_up and tuple(warm_up) != self.warm_up:
                self.close()
                self.warm_up = tuple(warm_up)
            self._fill()

    def _fill(self) -> None:
        new = [Worker(*self.arguments, self.warm_up) for _ in range(self.size - len(self.workers))]
        try:
            for worker in new:
                self.mechanisms = worker.await_ready()
        except BaseException:
            for worker in new:  # the others have the same fault, and need not tell it
                worker.kill()
            raise
        self.workers.extend(new)

    def run(self, calls: Sequence[Call]) -> list[Reply]:
        """Returns the replies in the order of the calls, which run one by one on each worker."""
        with self.lock:
            self._fill()
            replies = [Reply(None, "was not made")] * len(calls)
            waiting, busy = deque(self._batches(calls)), dict[Worker, range]()
            try:
                while waiting or busy:
                    while waiting and self.workers:
                        worker, batch = self.workers.popleft(), waiting.popleft()
                        worker.send(calls[batch.start : batch.stop])
                        busy[worker] = batch
                    for worker in answered(busy):
                        batch = busy.pop(worker)
                        replies[batch.start : batch.stop] = self._replies(worker, calls[batch.start : batch.stop])
            finally:  # an interrupt leaves calls without an answer
                for worker in busy:
                    worker.kill()
        return replies

    def _batches(self, calls: Sequence[Call]) -> Iterator[range]:
        """Yields which calls may share a process: neighbours of one function and deadline, spread over the workers."""
        most = min(self.batch, -(-len(calls) // self.size))
        first = 0
        for i in range(1, len(calls) + 1):
            kinds = {(call.function, call.deadline_s) for call in calls[i - 1 : i + 1]}
            if i == len(calls) or i - first == most or len(kinds) > 1:
                yield range(first, i)
                first = i

    def _replies(self, worker: Worker, calls: Sequence[Call]) -> list[Reply]:
        """Returns the replies, and puts the worker, or one in its place if it is broken, back into the row."""
        late = worker.patience_s() <= 0
        replies = worker.receive()
        if replies is not None:
            self.workers.append(worker)
            return replies
        worker.kill()
        other = Worker(*self.arguments, self.warm_up)
        other.await_ready()
        self.workers.append(other)
        reason = f"took longer than {calls[0].deadline_s:g} s" if late else "the worker ended"
        return [Reply(None, reason)] * len(calls)

    def close(self) -> None:
        """Ends the workers."""
        while self.workers:
            self.workers.pop().kill()


def answered(busy: Mapping[Worker, range]) -> list[Worker]:
    """Returns the workers that have answered, ended, or taken too long, as soon as there is one."""
    with selectors.DefaultSelector() as selector:
        for worker in busy:
            selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
        found = [key.data for key, _ in selector.select(max(min(worker.patience_s() for worker in busy), 0))]
    return found or [worker for worker in busy if worker.patience_s() <= 0]


def search_path() -> list[str]:
    """Returns where this process finds modules, for a worker. Links are followed: in a worker's root there are none."""
    return list(dict.fromkeys(map(os.path.realpath, [OURS, *sys.path])))


def library_folders() -> list[str]:
    """Returns the folders of Python's standard library and of installed packages, the files that a call may read."""
    paths = sysconfig.get_paths()
    found = [paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")] + site.getsitepackages()
    if site.ENABLE_USER_SITE:
        found.append(site.getusersitepackages())
    return [folder for folder in dict.fromkeys(map(os.path.realpath, found)) if os.path.isdir(folder)]
