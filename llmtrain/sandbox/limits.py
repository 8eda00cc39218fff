"""Bounds of one call, and which mechanisms of the kernel may be used."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """Bounds what one call may use. Every call has a deadline besides; its CPU time is bounded by that, rounded up."""

    memory_bytes: int = 1024 * MIB  # address space beyond that of the loaded worker
    scratch_bytes: int = 32 * MIB  # all files of the scratch folder together
    scratch_files: int = 256  # files and folders in it
    file_bytes: int = 16 * MIB  # one file
    open_files: int = 64  # descriptors
    reply_bytes: int = 256 * 1024  # the encoded reply


@dataclass(frozen=True)
class Mechanisms:
    """Says which mechanisms hold the calls of a worker. A mechanism that is missing here is missing on the machine.

    Example: Mechanisms(landlock=7, namespaces=True) on Linux 6.18
    """

    landlock: int = 0  # version of the kernel's interface; 0 = none
    namespaces: bool = False  # user, mount, network, process, IPC and host-name namespaces, with a root of their own
    seccomp: bool = False  # filter of system calls

    @property
    def fault(self) -> str | None:
        """Returns what is missing for a sandbox on this machine, with the remedy; None if enough is there."""
        if not self.seccomp:
            return "the kernel takes no seccomp filter; use Linux 4.8 or newer on x86_64 or aarch64"
        if self.landlock < LANDLOCK_NEEDED and not self.namespaces:
            return (
                f"neither Landlock {LANDLOCK_NEEDED} (this kernel has {self.landlock or 'none'}) nor user namespaces "
                "hide the files; use Linux 6.2 or newer with Landlock, or allow unprivileged user namespaces "
                "(in a container: a seccomp profile with unshare and mount)"
            )
        return None

    def __str__(self) -> str:
        found = {
            f"Landlock {self.landlock}": self.landlock,
            "namespaces": self.namespaces,
            "seccomp": self.seccomp,
        }
        return ", ".join(name for name, holds in found.items() if holds) or "none"


LANDLOCK_NEEDED = 3  # versions 1 and 2 let files be truncated
