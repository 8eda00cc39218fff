"""Says which rank is missing when a job hangs: every rank reports to the launcher's store and watches the next rank.

A collective whose partner is stopped fails after `engine.timeout_s` with a message that names no rank, or hangs in a
device. Those timeouts end the job; this module only says who hangs, where and in which step.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections import defaultdict
from datetime import timedelta

from torch.distributed import DistNetworkError, DistStoreError, PrefixStore, Store, TCPStore

BEAT_S = 1.0
QUIET_S = 30.0  # a rank without a beat for so long counts as stopped; at most half the timeout of collectives
LIBRARIES = ("torch.distributed.", "deepspeed.")
LEFT = "left"  # replaces the beat of a rank that has ended


class Watch:
    """Runs a thread beside the training of this rank. The trainer sets `step`."""

    def __init__(self, timeout_s: float) -> None:
        self.rank, self.size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.quiet_s, self.slow_s = min(QUIET_S, timeout_s / 2), 0.8 * timeout_s
        self.step, self.done, self.parent = 0, threading.Event(), os.getppid()
        self.moved = (0, time.monotonic())  # step, and when it began
        if self.size > 1:
            thread = threading.Thread(target=self._run, daemon=True)
            thread.start()
            atexit.register(self._leave, thread)

    def _leave(self, thread: threading.Thread) -> None:
        self.done.set()
        thread.join(2 * BEAT_S)

    def _run(self) -> None:
        with contextlib.suppress(DistNetworkError):  # the process that held the store has ended
            try:
                self._watch(_store(self.quiet_s))
            except DistStoreError:
                _say(
                    f"rank {self.rank}: the store of this job has not answered for {self.quiet_s:.0f} s; "
                    "the launcher of node 0, or without one rank 0, is stopped or cannot be reached"
                )
        # A dying process closes its sockets before its children get another parent, and the store may end without it.
        while os.getppid() == self.parent and not self.done.wait(BEAT_S):
            pass
        if not self.done.is_set():
            _say(f"rank {self.rank}: the launcher is gone; saving and stopping, as it cannot be told to any more")
            os.kill(os.getpid(), signal.SIGTERM)

    def _watch(self, store: Store) -> None:
        neighbour = (self.rank + 1) % self.size
        last, since, told = "", time.monotonic(), False
        store.set(str(self.rank), json.dumps(self._beat()))  # at once: a rank may stop within the first second
        while not self.done.wait(BEAT_S) and os.getppid() == self.parent:
            store.set(str(self.rank), json.dumps(self._beat()))
            beat = store.get(str(neighbour)).decode() if last or store.check([str(neighbour)]) else ""
            if beat != last:
                last, since, told = beat, time.monotonic(), False
            silent_s = time.monotonic() - since
            if silent_s > self.quiet_s and not told and beat != LEFT:
                told = True
                self._tell_silence(neighbour, silent_s, last)
            self._tell_standstill(store)
        store.set(str(self.rank), LEFT)

    def _beat(self) -> dict:
        """Returns what the other ranks read. The time makes every beat differ."""
        who = f"rank {self.rank} ({socket.gethostname()}, pid {os.getpid()})"
        return {"time": time.time(), "who": who, "step": self.step, "place": place()}

    def _tell_silence(self, neighbour: int, silent_s: float, last: str) -> None:
        beat = json.loads(last) if last else {"who": f"rank {neighbour}", "step": 0, "place": "its start"}
        _say(
            f"{beat['who']}: no sign of life for {silent_s:.0f} s, stopped, dead or cut off; last seen in step "
            f"{beat['step']}, in {beat['place']}. Rank {self.rank} is in step {self.step}, in {place()}"
        )

    def _tell_standstill(self, store: Store) -> None:
        """Prints where all ranks are, on one rank, when all are alive and the step does not end."""
        if self.moved[0] != self.step:
            self.moved = (self.step, time.monotonic())
        passed_s = time.monotonic() - self.moved[1]
        if self.step and passed_s > self.slow_s and store.add(f"standstill {self.step}", 1) == 1:
            _say(f"step {self.step} has taken {passed_s:.0f} s so far; {self._places(store)}")

    def _places(self, store: Store) -> str:
        ranks = defaultdict(list)
        for rank in range(self.size):
            beat = store.get(str(rank)).decode() if store.check([str(rank)]) else LEFT
            ranks[beat if beat == LEFT else json.loads(beat)["place"]].append(str(rank))
        return "; ".join(f"rank {', '.join(each)}: {where}" for where, each in ranks.items())


def place() -> str:
    """Returns where the main thread is, such as `all_reduce (llmtrain.trainer.loop.poll, line 140)`.

    It names the innermost function of the communication libraries, if the thread is in one, and the line of llmtrain
    that called it.
    """
    frame = sys._current_frames().get(threading.main_thread().ident)
    operation = ""
    while frame is not None:
        module, function = frame.f_globals.get("__name__", ""), frame.f_code.co_qualname
        if module.startswith("llmtrain.") and module != __name__:
            here = f"{module}.{function}, line {frame.f_lineno}"
            return f"{operation} ({here})" if operation else here
        if module.startswith(LIBRARIES) and not operation:
            operation = function
        frame = frame.f_back
    return operation or "code outside llmtrain"


def _store(timeout_s: float) -> Store:
    """Returns a separate connection to the store: a wait of the training must not delay the beats."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=timeout_s))
    return PrefixStore("watch" + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)


def _say(message: str) -> None:
    sys.stderr.write(f"{message}\n")  # in one piece: other ranks write there too
    sys.stderr.flush()
