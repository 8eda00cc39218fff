"""Gives a worker namespaces of its own: no network, no other processes, and a root with Python's libraries alone."""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import tempfile
import time
from collections.abc import Iterable
from typing import NoReturn

from llmtrain.sandbox import kernel
from llmtrain.sandbox.limits import Limits

NEWNS, NEWCGROUP, NEWUTS, NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000  # CLONE_NEW* of unshare(2)
NEWUSER, NEWPID, NEWNET = 0x10000000, 0x20000000, 0x40000000
ALL = NEWNS | NEWCGROUP | NEWUTS | NEWIPC | NEWUSER | NEWPID | NEWNET
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = (
    *(1, 2, 4, 8, 32),
    *(4096, 16384, 1 << 18),
)
AT_RECURSIVE, READ_ONLY_TREE = 0x8000, 0b111  # MOUNT_ATTR_RDONLY | NOSUID | NODEV
SCRATCH = "/scratch"  # in the new root
PARENT_CHECK_S = 0.5


def enter() -> bool:
    """Continues in a process of new namespaces, as their first process; False, and no change, where this is forbidden.

    The process that called becomes a guard that does not return: it ends with the worker, and ends it when its own
    parent is gone. It must have one thread only.
    """
    if not _allowed():
        return False
    parent = os.getppid()
    _unshare()
    worker = os.fork()
    if worker:
        _guard(worker, parent)
    kernel.die_with_parent()
    return True


def _unshare() -> None:
    """Enters the namespaces with the same user and group, and mounts that nobody else sees. Raises OSError."""
    uid, gid = os.getuid(), os.getgid()
    kernel.unshare(ALL)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)
    kernel.mount("none", "/", None, MS_REC | MS_PRIVATE)


def _allowed() -> bool:
    """Tries in a process of its own whether namespaces, and mounting in them, are allowed here."""
    trial = os.fork()
    if trial == 0:
        with contextlib.suppress(OSError):
            _unshare()
            change_root([os.path.dirname(os.__file__)])
            os._exit(0)
        os._exit(1)
    return os.waitpid(trial, 0)[1] == 0


def _guard(worker: int, parent: int) -> NoReturn:
    for descriptor in (0, 1):  # the pipes end with the worker
        os.close(descriptor)
    while True:
        found, status = os.waitpid(worker, os.WNOHANG)
        if found:
            os._exit(1 if status else 0)
        if os.getppid() != parent:
            os.kill(worker, signal.SIGKILL)
        time.sleep(PARENT_CHECK_S)


def change_root(folders: Iterable[str]) -> None:
    """Makes a root of which only `folders` exist, read-only, and an empty place for the scratch folder.

    Raises OSError.
    """
    held = {folder: os.open(folder, os.O_PATH | os.O_CLOEXEC) for folder in _outermost(folders)}
    root = tempfile.gettempdir()
    kernel.mount("none", root, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=1m")
    for folder, descriptor in held.items():
        os.makedirs(root + folder, exist_ok=True)
        kernel.mount(f"/proc/self/fd/{descriptor}", root + folder, None, MS_BIND | MS_REC)
        _protect(root + folder)
        os.close(descriptor)
    os.makedirs(root + SCRATCH)
    kernel.mount("none", root, None, MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV, "mode=755,size=1m")
    os.chdir(root)
    kernel.call(kernel.PIVOT_ROOT, b".", b".")  # the old root now lies over the new one
    kernel.unmount(".")
    os.chdir("/")


def _outermost(folders: Iterable[str]) -> list[str]:
    """Returns the folders that lie in no other of them."""
    found: list[str] = []
    for folder in sorted(set(folders)):
        if not any(folder.startswith(outer.rstrip("/") + "/") for outer in found):
            found.append(folder)
    return found


def _protect(folder: str) -> None:
    attributes = struct.pack("=4Q", READ_ONLY_TREE, 0, 0, 0)
    kernel.call(kernel.MOUNT_SETATTR, -100, folder.encode(), AT_RECURSIVE, attributes, len(attributes))


def mount_scratch(limits: Limits) -> None:
    """Puts an empty folder in memory at SCRATCH."""
    options = f"mode=700,size={limits.scratch_bytes},nr_inodes={limits.scratch_files + 1}"
    kernel.mount("none", SCRATCH, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, options)


def unmount_scratch() -> None:
    """Drops the folder with all that is in it."""
    kernel.unmount(SCRATCH)
