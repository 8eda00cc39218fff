"""Runs a server as long as the process that wants it: `python keeper.py PARENT FOLDER COMMAND...`, on Linux.

It ends the server, with all processes of it, when the parent has ended in whatever way, when it is told to (SIGTERM),
and when the server's first process has ended by itself. Then it removes FOLDER.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress

LOOK_S, LEAVE_S = 0.2, 5.0  # between looks at the parent; for the server to leave by itself
PR_SET_PDEATHSIG = 1  # prctl(2)
libc = ctypes.CDLL(None)


def main(parent: int, folder: str, command: list[str]) -> int:
    """Returns the exit code of the server."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    server = None
    try:
        if os.getppid() == parent:
            server = subprocess.Popen(command, start_new_session=True, preexec_fn=die_with_parent)
        while server and os.getppid() == parent and server.poll() is None:
            time.sleep(LOOK_S)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if server:
            end(server)
        shutil.rmtree(folder, ignore_errors=True)
    return server.returncode if server else 1


def end(server: subprocess.Popen[bytes]) -> None:
    """Ends a process and all of its group: first it may leave by itself, with what it shared."""
    server.terminate()
    latest = time.monotonic() + LEAVE_S
    while time.monotonic() < latest and (server.poll() is None or group_lives(server.pid)):
        time.sleep(0.02)
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)  # a stopped process dies of it, too
    server.wait()


def group_lives(group: int) -> bool:
    """Tells whether a process of the group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def die_with_parent() -> None:
    """Makes the kernel kill this process when its parent ends: if it is the keeper that is killed."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
