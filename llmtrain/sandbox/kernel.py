"""Calls the kernel where Python has no function for it. Linux on x86_64 and aarch64."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import signal

MACHINE = platform.machine()
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}.get(MACHINE, -1)  # syscall numbers; newer ones are the same on both
CLOSE_RANGE, MOUNT_SETATTR = 436, 442
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38  # prctl(2)
CAPABILITY_VERSION_3 = 0x20080522  # capset(2)

libc = ctypes.CDLL(None, use_errno=True)


def call(number: int, *arguments: int | bytes | ctypes.Array | None) -> int:
    """Makes a system call by its number. Raises OSError."""
    return checked(libc.syscall(ctypes.c_long(number), *map(_word, arguments)), f"system call {number}")


def _word(value: int | bytes | ctypes.Array | None) -> object:
    return ctypes.c_long(value) if isinstance(value, int) else value


def checked(result: int, what: str) -> int:
    """Returns the result of a call of libc. Raises OSError when it is -1."""
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def prctl(option: int, *arguments: int | bytes | None) -> int:
    """Calls prctl(2). Raises OSError."""
    padded = [*map(_word, arguments), *[ctypes.c_long(0)] * (4 - len(arguments))]
    return checked(libc.prctl(ctypes.c_int(option), *padded), f"prctl {option}")


def unshare(flags: int) -> None:
    """Calls unshare(2), which Python has from 3.12 on. Raises OSError."""
    checked(libc.unshare(ctypes.c_int(flags)), "unshare")


def mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    """Calls mount(2). Raises OSError."""
    texts = [None if text is None else text.encode() for text in (source, target, kind)]
    checked(libc.mount(*texts, ctypes.c_ulong(flags), options.encode()), f"mount {target}")


def unmount(target: str) -> None:
    """Detaches what is mounted at `target`, whoever still uses it. Raises OSError."""
    checked(libc.umount2(target.encode(), ctypes.c_int(2)), f"umount {target}")  # MNT_DETACH


def die_with_parent() -> None:
    """Makes the kernel kill this process when the thread that started it ends."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def close_from(first: int) -> None:
    """Closes all descriptors from `first` on. Raises OSError where some stay open."""
    try:
        call(CLOSE_RANGE, first, 2**31 - 1, 0)
    except OSError:  # Linux before 5.9
        os.closerange(first, max(resource.getrlimit(resource.RLIMIT_NOFILE)[0], 65536))


def drop_capabilities() -> None:
    """Gives up all capabilities, those of root in a namespace too. Raises OSError."""
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    nothing = (ctypes.c_uint32 * 6)()
    checked(libc.capset(header, nothing), "capset")


def address_space_bytes() -> int:
    """Returns the size of the address space of this process."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def limit_resources(limits: dict[int, int]) -> None:
    """Sets soft and hard limits (RLIMIT_* -> value), lower than those in force where these are lower."""
    for name, value in limits.items():
        hard = resource.getrlimit(name)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (value, value))
