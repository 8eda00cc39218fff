"""Runs a command no longer than the process that wants it lives: `python keeper.py PIPE COMMAND...`, on Linux.

Who wants it holds the other end of the pipe, alone. Where that closes, as the kernel sees to however a process ends,
the whole process group of this one is killed: the command, and what it has started. It imports nothing of llmtrain.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading


def main(pipe: int, command: list[str]) -> int:
    """Returns the status of the command; ends by the signal that it ended by."""
    threading.Thread(target=end_with, args=(pipe,), daemon=True).start()
    try:
        status = subprocess.Popen(command).wait()
    except OSError as error:
        print(f"cannot be started: {error}", file=sys.stderr)
        return 127
    if status < 0:
        with contextlib.suppress(OSError):  # of SIGKILL, which nobody handles
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


def end_with(pipe: int) -> None:
    """Waits until the other end of a pipe is closed, and kills the process group."""
    poll = select.poll()
    poll.register(pipe, 0)  # a closed end is always told
    poll.poll()
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
