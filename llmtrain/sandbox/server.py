"""The worker process: loads functions once, then answers each call in a process of its own that it forks and locks.

Frames on stdin and stdout: a length of four bytes and that much JSON. The first one says what to load; the answer
{"ready": mechanisms} or {"fault": reason} comes back. Every other one is {"function", "arguments", "deadline_s"}; the
answer is {"reply": text that the call wrote} or {"fault": reason}. What the call wrote is passed on unread.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
import importlib.util
import json
import os
import selectors
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

from llmtrain.sandbox import canary, kernel, landlock, namespaces, seccomp
from llmtrain.sandbox.limits import Limits, Mechanisms
from llmtrain.sandbox.lock import Lock, enter_lock

Function = Callable[..., Any]
MOST_FRAME_BYTES = 2**26
OOM_FIRST = "1000"  # oom_score_adj: of all processes, a worker is killed first when memory runs out


class Settings(NamedTuple):
    """What the first frame says."""

    functions: dict[str, str]  # name -> module:function or file.py:function
    sandboxed: bool
    readable: list[str]  # folders of Python's libraries
    limits: Limits
    without: list[str]  # mechanisms that are not used (tests)


def main() -> None:
    """Serves until stdin ends."""
    first = read_frame()
    settings = Settings(**{**first, "limits": Limits(**first["limits"])})
    if not settings.sandboxed:
        serve_unlocked(settings)
        return
    spaced = "namespaces" not in settings.without and namespaces.enter()
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write(OOM_FIRST)
    functions = load_all(settings.functions)
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
    """Answers calls, one after the other, if the lock holds."""
    fault = lock.mechanisms.fault
    if fault is None:
        tried = run_locked(canary.escapes, json.dumps([lock.readable]).encode(), 10.0, lock)
        fault = None if tried == {"reply": canary.HELD} else f"the sandbox does not hold here: {tried}"
    write_frame({"fault": fault} if fault else {"ready": dataclasses.asdict(lock.mechanisms)})
    gc.collect()
    gc.freeze()  # no collection in a call touches, and so copies, the pages of what is loaded
    while not fault and (request := read_frame()) is not None:
        payload = json.dumps(request["arguments"]).encode()
        write_frame(run_locked(functions[request["function"]], payload, request["deadline_s"], lock))


def run_locked(function: Function, payload: bytes, deadline_s: float, lock: Lock) -> dict[str, str]:
    """Returns the frame for one call, whose process is gone when this returns."""
    if lock.mechanisms.namespaces:
        namespaces.mount_scratch(lock.limits)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            enter_lock(lock, writing, deadline_s)
            os.write(lock.reply, call(function, json.loads(payload)))
        finally:
            os._exit(0)
    os.close(writing)
    text, fault = collect(reading, time.monotonic() + deadline_s, lock.limits.reply_bytes)
    os.close(reading)
    os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if lock.mechanisms.namespaces:
        namespaces.unmount_scratch()
    if fault is None and not text:
        fault = f"ended without a reply ({f'signal {-status}' if status < 0 else f'exit code {status}'})"
    return {"fault": fault.format(deadline_s=deadline_s)} if fault else {"reply": text}


def collect(reading: int, give_up: float, most_bytes: int) -> tuple[str, str | None]:
    """Returns what a call wrote until it closed its pipe, and what went wrong."""
    found = b""
    with selectors.DefaultSelector() as selector:
        selector.register(reading, selectors.EVENT_READ)
        while selector.select(max(give_up - time.monotonic(), 0)):
            part = os.read(reading, 65536)
            found += part
            if not part:
                return found.decode(errors="replace"), None
            if len(found) > most_bytes:
                return "", f"the reply is longer than {most_bytes} bytes"
    return "", "took longer than {deadline_s:g} s"


def call(function: Function, arguments: list[Any]) -> bytes:
    """Returns the reply of a function: {"value": what it returned} or {"error": what it raised}."""
    try:
        return json.dumps({"value": function(*arguments)}).encode()
    except BaseException as error:  # whatever it is, it must not end the process without a reply
        return json.dumps({"error": describe(error)}).encode()


def describe(error: BaseException) -> str:
    """Returns the kind of an error and its text, cut to 300 characters."""
    return f"{type(error).__name__}: {error}"[:300].rstrip(": ")


def serve_unlocked(settings: Settings) -> None:
    """Answers calls in this very process, where the functions keep what they remember."""
    functions = load_all(settings.functions)
    if functions is None:
        return
    write_frame({"ready": dataclasses.asdict(Mechanisms())})
    while (request := read_frame()) is not None:
        reply = call(functions[request["function"]], request["arguments"])
        write_frame({"reply": reply.decode()})


def load_all(wanted: dict[str, str]) -> dict[str, Function] | None:
    """Returns the functions by name. If one cannot be loaded, writes why and returns None."""
    try:
        return {name: load(spec) for name, spec in wanted.items()}
    except Exception as error:
        lines = traceback.format_exception(error, limit=-2)
        write_frame({"fault": f"{describe(error)}\n{''.join(lines).strip()}", "loading": True})
        return None


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
    view = memoryview(len(body).to_bytes(4, "little") + body)
    while view:
        view = view[os.write(CHANNEL[1], view) :]
