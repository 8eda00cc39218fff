"""The worker process: loads functions once, then answers each call in a process of its own that it forks and locks.

Frames on stdin and stdout: a length of four bytes and that much JSON. The first one says what to load; the answer
{"ready": mechanisms} or {"fault": reason} comes back. Every other one is {"function", "calls": arguments of each,
"deadline_s": of each}; the answer is {"frames": for each call {"reply": text that it wrote} or {"fault": reason}}. What
a call wrote is passed on unread.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
import importlib.util
import inspect
import json
import os
import select
import selectors
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

from llmtrain.sandbox import canary, kernel, landlock, namespaces, seccomp
from llmtrain.sandbox.limits import Limits, Mechanisms
from llmtrain.sandbox.lock import Lock, enter_lock

Function = Callable[..., Any]
Frame = dict[str, str]
"""{"reply": what a call wrote} or {"fault": why it wrote nothing}"""
MOST_FRAME_BYTES = 2**26
OOM_FIRST = "1000"  # oom_score_adj: of all processes, a worker is killed first when memory runs out


class Settings(NamedTuple):
    """What the first frame says."""

    functions: dict[str, str]  # name -> module:function or file.py:function
    sandboxed: bool
    readable: list[str]  # folders of Python's libraries
    limits: Limits
    without: list[str]  # mechanisms that are not used (tests)
    takes: dict[str, int]  # name -> how many arguments a plain function of that name must take
    made: dict[str, dict[str, Any]]  # name -> keyword arguments for which what is loaded returns the function
    warm_up: list[Any]  # arguments of the function `warm_up`, if there is one


def main() -> None:
    """Serves until stdin ends."""
    first = read_frame()
    settings = Settings(**{**first, "limits": Limits(**first["limits"])})
    if not settings.sandboxed:
        serve_unlocked(settings)
        end_group()
        return
    spaced = "namespaces" not in settings.without and namespaces.enter()
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write(OOM_FIRST)
    functions = load_all(settings)
    if functions is not None:
        serve(functions, prepare(settings, spaced))


def prepare(settings: Settings, spaced: bool) -> Lock:
    """Returns how calls are locked, after the last step that needs files."""
    size, null = kernel.address_space_bytes(), os.open(os.devnull, os.O_RDWR)
    if spaced:
        namespaces.change_root(settings.readable)
    abi = 0 if "landlock" in settings.without else landlock.version()
    return Lock(settings.limits, settings.readable, Mechanisms(abi, spaced, seccomp.available()), size, null)


def serve(functions: dict[str, Function], lock: Lock) -> None:
    """Answers requests, one after the other, if the lock holds."""
    fault = lock.mechanisms.fault
    if fault is None:
        (tried,) = run_locked(canary.escapes, [[lock.readable]], 10.0, lock)
        fault = None if tried == {"reply": canary.HELD} else f"the sandbox does not hold here: {tried}"
    write_frame({"fault": fault} if fault else {"ready": dataclasses.asdict(lock.mechanisms)})
    gc.collect()
    gc.freeze()  # no collection in a call touches, and so copies, the pages of what is loaded
    while not fault and (request := read_frame()) is not None:
        frames = run_all(functions[request["function"]], request["calls"], request["deadline_s"], lock)
        write_frame({"frames": frames})


def run_all(function: Function, calls: list[list[Any]], deadline_s: float, lock: Lock) -> list[Frame]:
    """Returns the frames of calls that share a process until one of them fails; the next ones then have another."""
    frames: list[Frame] = []
    while len(frames) < len(calls):
        frames += run_locked(function, calls[len(frames) :], deadline_s, lock)
    return frames


def run_locked(function: Function, calls: list[list[Any]], deadline_s: float, lock: Lock) -> list[Frame]:
    """Returns the frames of the first calls, up to one that failed. Their process is gone when this returns."""
    if lock.mechanisms.namespaces:
        namespaces.mount_scratch(lock.limits)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            enter_lock(lock, writing, deadline_s * len(calls))
            for arguments in calls:
                write_all(lock.reply, call(function, arguments) + b"\n")
        finally:
            os._exit(0)
    os.close(writing)
    lines, fault = collect(reading, len(calls), deadline_s, lock.limits.reply_bytes)
    os.close(reading)
    os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if lock.mechanisms.namespaces:
        namespaces.unmount_scratch()
    if fault is None and len(lines) < len(calls):
        fault = f"ended without a reply ({f'signal {-status}' if status < 0 else f'exit code {status}'})"
    return [{"reply": line} for line in lines] + ([{"fault": fault}] if fault else [])


def collect(reading: int, count: int, deadline_s: float, most_bytes: int) -> tuple[list[str], str | None]:
    """Returns the lines that a process writes, `count` at most, each within its time, and why there are no more."""
    lines, rest, give_up = [], b"", time.monotonic() + deadline_s
    with selectors.DefaultSelector() as selector:
        selector.register(reading, selectors.EVENT_READ)
        while len(lines) < count:
            if not selector.select(max(give_up - time.monotonic(), 0)):
                return lines, f"took longer than {deadline_s:g} s"
            part = os.read(reading, 65536)
            if not part:
                return lines, None
            *whole, rest = (rest + part).split(b"\n")
            if max(map(len, [*whole, rest])) > most_bytes:
                return lines, f"the reply is longer than {most_bytes} bytes"
            if whole:
                lines += [line.decode(errors="replace") for line in whole][: count - len(lines)]
                give_up = time.monotonic() + deadline_s
    return lines, None


def call(function: Function, arguments: list[Any]) -> bytes:
    """Returns the reply of a function: {"value": what it returned} or {"error": what it raised}."""
    try:
        return json.dumps({"value": function(*arguments)}, default=number).encode()
    except BaseException as error:  # whatever it is, it must not end the process without a reply
        return json.dumps({"error": describe(error)}).encode()


def number(value: Any) -> float:
    """Returns a number of numpy, torch or another library, without dimensions, as a float. Raises TypeError for others.

    Example: numpy.float32(0.5) -> 0.5
    """
    if hasattr(value, "__float__") and not getattr(value, "shape", ()):
        return float(value)
    raise TypeError(f"returned a value of type {type(value).__name__}, which is no number; return float(...) of it")


def describe(error: BaseException) -> str:
    """Returns the kind of an error and its text, cut to 300 characters."""
    return f"{type(error).__name__}: {error}"[:300].rstrip(": ")


def serve_unlocked(settings: Settings) -> None:
    """Answers calls in this very process, where the functions keep what they remember. It ends with who asks, with all
    that it started, whatever it is doing then."""
    threading.Thread(target=end_with_asker, daemon=True).start()
    functions = load_all(settings)
    if functions is None:
        return
    write_frame({"ready": dataclasses.asdict(Mechanisms())})
    while (request := read_frame()) is not None:
        replies = [call(functions[request["function"]], arguments).decode() for arguments in request["calls"]]
        write_frame({"frames": [{"reply": reply} for reply in replies]})


def end_with_asker() -> None:
    """Waits until the process that asks is gone, or lets go of this one, and ends the group. (PR_SET_PDEATHSIG goes by
    the thread that started this process, and leaves alone what the functions have started.)"""
    poll = select.poll()
    poll.register(CHANNEL[0], 0)  # of events a closed end alone, which is always told
    poll.poll()
    end_group()


def end_group() -> None:
    """Ends this process with its threads and all that it started, if it leads a group of its own, as workers do."""
    sys.stderr.flush()
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)


def load_all(settings: Settings) -> dict[str, Function] | None:
    """Returns the functions by name, after a call of `warm_up`. If one cannot be loaded, says so and returns None."""
    try:
        functions = {name: load(spec) for name, spec in settings.functions.items()}
        functions |= {name: functions[name](**arguments) for name, arguments in settings.made.items()}
        for name, count in settings.takes.items():
            check_plain(functions[name], settings.functions[name].rpartition(":")[2], count)
        if "warm_up" in functions:
            functions["warm_up"](*settings.warm_up)
        return functions
    except BaseException as error:  # also sys.exit at import
        write_frame({"fault": f"{describe(error)}{where(error)}".replace("\n", " "), "loading": True})
        return None


def where(error: BaseException) -> str:
    """Returns the last place of an error in a file that is not this one. Example: " (mine.py:3)" """
    places = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__ and f.filename[0] != "<"]
    return f" ({places[-1].filename}:{places[-1].lineno})" if places else ""


def check_plain(function: Any, name: str, count: int) -> None:
    """Raises TypeError, with the remedy, if this is no plain function that `count` arguments can be given to."""
    if not callable(function):
        raise TypeError(f"{name} is of type {type(function).__name__}, no function; name a function")
    kinds = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)
    if any(kind(function) for kind in kinds):
        raise TypeError(f"{name} is an async function or a generator; use a plain one that returns the value")
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions of compiled modules tell nothing
        return
    try:
        signature.bind(*range(count))
    except TypeError as error:
        raise TypeError(f"{name}{signature} cannot be called with {count} arguments: {error}; mend it") from None


def load(spec: str) -> Function:
    """Returns the function that `module:function` or `path/file.py:function` names; several modules lie in one file's
    folder, which is searched for its imports."""
    place, _, name = spec.rpartition(":")
    if not place.endswith(".py"):
        return getattr(importlib.import_module(place), name)
    sys.path.insert(0, os.path.dirname(place))
    module_name = os.path.basename(place).removesuffix(".py")
    found = importlib.util.spec_from_file_location(module_name, place)
    module = importlib.util.module_from_spec(found)
    sys.modules[module_name] = module
    found.loader.exec_module(module)
    return getattr(module, name)


CHANNEL: list[int] = [0, 1]  # descriptors of frames, until `own_channel` moves them


def own_channel() -> None:
    """Moves the frames away from stdin and stdout, to which the functions may print."""
    CHANNEL[:] = [os.dup(0), os.dup(1)]
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(2, 1)
    os.close(null)


def read_frame() -> dict[str, Any] | None:
    """Returns the next frame, None at the end."""
    head = _read(4)
    if len(head) < 4:
        return None
    body = _read(int.from_bytes(head, "little"))
    return json.loads(body)


def _read(count: int) -> bytes:
    parts = []
    while count and (part := os.read(CHANNEL[0], min(count, MOST_FRAME_BYTES))):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def write_frame(content: dict[str, Any]) -> None:
    """Writes one frame."""
    body = json.dumps(content).encode()
    write_all(CHANNEL[1], len(body).to_bytes(4, "little") + body)


def write_all(descriptor: int, content: bytes) -> None:
    """Writes all bytes to a pipe."""
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]
