"""Profiles a step of two contestants: their operators side by side."""

from __future__ import annotations

import os
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import Contestant
from benchmarks.task import WARMUP_STEPS, Task

STEPS = 3
ROWS = 30
NAME = 72  # width of the names, in characters


class Profiled:
    """Stands in for `common.Turns`: profiles some steps after those of the warmup, then stops the contestant."""

    def __init__(self, warmup: int = WARMUP_STEPS, steps: int = STEPS) -> None:
        self.gpu, self.warmup, self.steps = torch.cuda.is_available(), warmup, steps
        self.step, self.profile = 0, profile(activities=[ProfilerActivity.CUDA if self.gpu else ProfilerActivity.CPU])

    def wait(self) -> bool:
        if self.step == self.warmup:
            self.profile.start()
        return self.step < self.warmup + self.steps

    def count_memory(self) -> None:
        """Does nothing: a profile measures no memory."""

    def done(self, value: Any) -> None:
        self.step += 1
        if self.step == self.warmup + self.steps:
            if self.gpu:
                torch.cuda.synchronize()
            self.profile.stop()

    def milliseconds(self) -> dict[str, float]:
        """Returns the time of one step by operator, without that of the operators it calls; on a GPU by kernel."""
        events = self.profile.key_averages()
        own = "self_device_time_total" if self.gpu else "self_cpu_time_total"
        return {e.key: getattr(e, own) / 1e3 / self.steps for e in events}


def _run(contestant: Contestant, task: Task, threads: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    turns = Profiled()
    contestant(turns, task)
    return turns.milliseconds()


def table(found: dict[str, dict[str, float]], by_difference: bool) -> str:
    """Returns two columns of milliseconds and their difference, sorted by the difference or by the time."""
    (a, first), (b, second) = found.items()
    rows = [(name, first.get(name, 0.0), second.get(name, 0.0)) for name in first.keys() | second.keys()]
    rows.sort(key=lambda row: -abs(row[1] - row[2]) if by_difference else -max(row[1:]))
    lines = [f"{'ms a step':{NAME}}{a:>26}{b:>26}{'difference':>12}"]
    lines += [f"{n[: NAME - 1]:{NAME}}{x:>26.1f}{y:>26.1f}{x - y:>12.1f}" for n, x, y in rows[:ROWS]]
    total = [sum(column.values()) for column in (first, second)]
    return "\n".join([*lines, f"{'all':{NAME}}{total[0]:>26.1f}{total[1]:>26.1f}{total[0] - total[1]:>12.1f}", ""])


def write_profile(
    pair: dict[str, Contestant], task: Task, threads: int, path: Path, by_difference: bool = True
) -> None:
    """Profiles each contestant in a process, one after the other, so that neither slows the other."""
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        found = {name: pool.apply(_run, (contestant, task, threads)) for name, contestant in pair.items()}
    text = (
        table(found, by_difference)
        + f"load average {os.getloadavg()[0]:.1f}, {threads} threads, torch {torch.__version__}\n"
    )
    path.write_text(text)
    print(text)
