"""Runs contestants of a benchmark in processes of their own, taking turns, and measures them."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch


@dataclass
class Turns:
    """Holds a contestant's end of the pipe. It runs `while turns.wait(): turns.done(one piece of work)`."""

    pipe: Connection
    left: int = 0  # pieces of work in this turn
    values: list = field(default_factory=list)
    floor_bytes: int = 0  # memory that the process had before, not counted
    warm: bool = False  # True after the first turn

    def wait(self) -> bool:
        """Blocks until it is this contestant's turn, where the clock starts; returns False when no turn is left."""
        if self.left:
            return True
        self.left, self.values = self.pipe.recv(), []
        self.wall, self.cpu = time.perf_counter(), cpu_s()
        return self.left > 0

    def count_memory(self) -> None:
        """Counts memory from here on, above what this process now has (libraries, weights)."""
        self.floor_bytes = forget_peak()

    def done(self, value: Any) -> None:
        """Reports a finished piece of work; after the last of a turn its measurements are sent."""
        self.values.append(value)
        self.left -= 1
        if self.left:
            return
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        times = {"wall_s": time.perf_counter() - self.wall, "cpu_s": cpu_s() - self.cpu}
        peak = peak_bytes() - self.floor_bytes
        if not self.warm:  # compiling is not part of a step, and its memory depends on the compiler's cache
            forget_peak(trim=False)
            self.warm = True
        self.pipe.send({"values": self.values, **times, "peak_bytes": peak, "children_bytes": children_bytes()})


def cpu_s() -> float:
    """Returns the CPU seconds of this process and of all that it has started, alive or ended."""
    ended, living = os.times(), psutil.Process().children(recursive=True)
    return (
        time.process_time() + ended.children_user + ended.children_system + sum(sum(p.cpu_times()[:4]) for p in living)
    )


def children_bytes() -> int:
    """Returns the memory that the living processes which this one has started share with no other."""
    return sum(p.memory_full_info().uss for p in psutil.Process().children(recursive=True))


def peak_bytes() -> int:
    """Returns the peak memory of this process: that of the GPU if it uses one, else the resident set.

    (`ru_maxrss` would start with that of the parent.)
    """
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def forget_peak(trim: bool = True) -> int:
    """Resets `peak_bytes`; returns the memory held now. With `trim` the allocator first releases what it keeps
    unused."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if trim:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak becomes what is resident
    return peak_bytes()


Contestant = Callable[..., None]
"""A contestant is called with its Turns and the benchmark's arguments; it returns when `Turns.wait` returns False."""


def _run(pipe: Connection, contestant: Contestant, threads: int, args: tuple) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    contestant(Turns(pipe), *args)


def compete(
    contestants: dict[str, Contestant], args: tuple, threads: int, warmup: int, work: int, rounds: int
) -> dict[str, list[dict]]:
    """Returns the measurements of each contestant: `rounds` turns of `work` pieces after a first turn of `warmup`
    pieces.

    In every round each contestant has one turn; the others sleep. Raises RuntimeError when one dies.
    """
    context, pipes, processes = get_context("spawn"), {}, []
    for name, contestant in contestants.items():
        pipes[name], end = context.Pipe()
        processes.append(context.Process(target=_run, args=(end, contestant, threads, args), daemon=True))
        processes[-1].start()
        end.close()  # else recv() would wait for a dead contestant
    measured: dict[str, list[dict]] = {name: [] for name in contestants}
    for pieces in [warmup] + [work] * rounds:
        for name, pipe in pipes.items():
            measured[name].append(_one_turn(name, pipe, pieces))
    for pipe, process in zip(pipes.values(), processes, strict=True):
        pipe.send(0)
        process.join()
    return measured


def _one_turn(name: str, pipe: Connection, pieces: int) -> dict:
    try:
        pipe.send(pieces)
        return pipe.recv()
    except (EOFError, ConnectionError):
        raise RuntimeError(f"contestant {name!r} died; its traceback is above") from None


def environment(module: str, packages: tuple[str, ...], threads: int) -> dict:
    """Returns what a reader needs to judge the figures: hardware, load, versions, command."""
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": cpu[0].split(":")[1].strip(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "threads": threads,
        "allocator": {name: value for name, value in os.environ.items() if name.startswith(("MALLOC_", "LD_PRELOAD"))},
        "command": " ".join(["python -m", module, *sys.argv[1:]]),
    }
