"""Locks the process of one call: what it had is closed, what it may use is bounded, what it may do is filtered."""

from __future__ import annotations

import math
import os
import resource
from dataclasses import dataclass

from llmtrain.sandbox import kernel, landlock, namespaces, seccomp
from llmtrain.sandbox.limits import Limits, Mechanisms


@dataclass(frozen=True)
class Lock:
    """Says how the calls of a worker are locked."""

    limits: Limits
    readable: list[str]  # folders
    mechanisms: Mechanisms
    loaded_bytes: int  # address space of the worker
    null: int  # descriptor of /dev/null

    reply = 3  # descriptor of the pipe to the worker, the only one beside /dev/null as 0, 1 and 2


def enter_lock(lock: Lock, reply: int, deadline_s: float) -> None:
    """Locks this process for good; `reply` becomes descriptor 3. Raises OSError where a mechanism fails."""
    kernel.die_with_parent()
    keep_descriptors(lock.null, reply)
    kernel.limit_resources(resource_limits(lock, deadline_s))
    os.chdir(namespaces.SCRATCH if lock.mechanisms.namespaces else "/")
    os.environ.clear()
    os.environ["HOME"] = os.environ["TMPDIR"] = os.getcwd()
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)  # no core file, which a program of the system would receive
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    if lock.mechanisms.landlock:
        scratch = [namespaces.SCRATCH] if lock.mechanisms.namespaces else []
        landlock.restrict(lock.readable, scratch, lock.mechanisms.landlock)
    kernel.drop_capabilities()
    kernel.die_with_parent()  # again: a change of capabilities may have undone it
    seccomp.install(os.getpid())


def keep_descriptors(null: int, reply: int) -> None:
    """Leaves /dev/null as 0, 1 and 2, and `reply` as 3."""
    high = os.dup(reply)
    for target in (0, 1, 2):
        os.dup2(null, target)
    os.dup2(high, Lock.reply)
    kernel.close_from(Lock.reply + 1)


def resource_limits(lock: Lock, deadline_s: float) -> dict[int, int]:
    """Returns the limits of one call for setrlimit(2)."""
    return {
        resource.RLIMIT_AS: lock.loaded_bytes + lock.limits.memory_bytes,
        resource.RLIMIT_CPU: math.ceil(deadline_s) + 1,
        resource.RLIMIT_FSIZE: lock.limits.file_bytes,
        resource.RLIMIT_NOFILE: lock.limits.open_files,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_SIGPENDING: 64,
    }
