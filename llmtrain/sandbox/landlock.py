"""Restricts a process to some files with Landlock (Documentation/userspace-api/landlock.rst of Linux)."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterable

from llmtrain.sandbox import kernel

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
CREATE_RULESET_VERSION, RULE_PATH_BENEATH = 1, 1
READ_FILE, READ_DIR = 1 << 2, 1 << 3  # LANDLOCK_ACCESS_FS_*
NODES = (1 << 6) | (1 << 9) | (1 << 11)  # MAKE_CHAR, MAKE_SOCK, MAKE_BLOCK: in no folder
FS_BITS = {1: 13, 2: 14, 3: 15, 4: 15}  # rights on files by version; REFER, TRUNCATE, IOCTL_DEV came later
NET_RIGHTS = 0b11  # LANDLOCK_ACCESS_NET_BIND_TCP, CONNECT_TCP: from version 4 on
SCOPES = 0b11  # LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET, SIGNAL: from version 6 on


def version() -> int:
    """Returns the version of the kernel's Landlock, 0 without it."""
    result = kernel.libc.syscall(ctypes.c_long(CREATE_RULESET), None, ctypes.c_long(0), CREATE_RULESET_VERSION)
    return max(result, 0)


def restrict(readable: Iterable[str], writable: Iterable[str], abi: int) -> None:
    """Leaves this process the files below `readable`, and all but device files and sockets below `writable`.

    It needs PR_SET_NO_NEW_PRIVS. Also forbids TCP, and signals and abstract sockets to processes outside, where
    version `abi` knows them. Raises OSError.
    """
    rights = (1 << FS_BITS.get(abi, 16)) - 1
    attributes = [rights, NET_RIGHTS, SCOPES][: 1 + (abi >= 4) + (abi >= 6)]
    ruleset = kernel.call(CREATE_RULESET, struct.pack(f"={len(attributes)}Q", *attributes), 8 * len(attributes), 0)
    for path in readable:
        _allow(ruleset, path, READ_FILE | READ_DIR)
    for path in writable:
        _allow(ruleset, path, rights & ~NODES)
    kernel.call(RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        folder = os.open(path, os.O_PATH | os.O_CLOEXEC | os.O_DIRECTORY)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return  # nothing there, so nothing to allow
        raise
    kernel.call(ADD_RULE, ruleset, RULE_PATH_BENEATH, struct.pack("=Qi", rights, folder), 0)
    os.close(folder)
