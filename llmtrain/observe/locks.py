"""Locks the directories that a job writes: one job at a time, and a second one is told who the first is.

A lock is a file in the directory that a process holds open (flock(2)), so it ends with the process however that ends.
Children that inherit the descriptor hold it too.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO

from llmtrain.observe.log import log

RUN_LOCK = ".llmtrain.lock"  # of a run directory
RESTART_S = 10.0  # how long a restarted rank waits for the end of the one before it

_held: dict[str, IO[str]] = {}  # directories that this process has locked until it ends


def hold(directory: str) -> None:
    """Locks a run directory until this process ends. Raises ValueError as `locked` does."""
    place = os.path.realpath(directory)
    if place not in _held:
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
        _held[place] = _taken(directory, RUN_LOCK, RESTART_S if restarted else 0.0)


@contextmanager
def locked(directory: str, patience_s: float = 0.0) -> Iterator[int]:
    """Holds the lock of a run directory, which is created where it is missing; yields the file descriptor.

    Raises ValueError, naming host and process of the job that holds it, if that has not ended after `patience_s`.
    """
    with _taken(directory, RUN_LOCK, patience_s) as file:
        yield file.fileno()


@contextmanager
def making(path: str) -> Iterator[None]:
    """Holds a lock beside a file or directory that is to be made, and removes it afterwards. Raises ValueError as
    `locked` does."""
    parent, name = os.path.split(os.path.realpath(path))
    with _taken(parent, f".{name}.llmtrain.lock", 0.0) as file:
        try:
            yield
        finally:
            with suppress(FileNotFoundError):
                os.unlink(file.name)


def _taken(directory: str, name: str, patience_s: float) -> IO[str]:
    give_up = time.monotonic() + patience_s
    file = _opened(directory, name)
    while not (got := _flock(file, directory)) or _was_removed(file):
        if not got and time.monotonic() > give_up:
            holder = _holder(file)
            file.close()
            raise ValueError(
                f"{directory}: another job is at work there: {holder}; wait for it, stop it, or give this one another "
                "name"
            )
        time.sleep(0.1)
        file.close()
        file = _opened(directory, name)
    _sign(file)
    return file


def _opened(directory: str, name: str) -> IO[str]:
    try:
        os.makedirs(directory, exist_ok=True)
        return open(os.path.join(directory, name), "a+", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{directory}: cannot be written: {error.strerror}; choose another directory") from None


def _was_removed(file: IO[str]) -> bool:
    """Says whether the one who held the file before has removed it, so that others may hold a new one."""
    try:
        return not os.path.samestat(os.fstat(file.fileno()), os.stat(file.name))
    except FileNotFoundError:
        return True


def _flock(file: IO[str], directory: str) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        log(f"{directory}: cannot be locked on this file system ({error.strerror}); start no other job there")
    return True


def _sign(file: IO[str]) -> None:
    file.truncate(0)
    file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%F %T")}) + "\n")
    file.flush()


def _holder(file: IO[str]) -> str:
    file.seek(0)
    try:
        who = json.loads(file.read())
        return f"process {who['pid']} on host {who['host']} (or a stage that it started), since {who['since']}"
    except (ValueError, KeyError, TypeError):
        return "a process that has not given its name yet"
