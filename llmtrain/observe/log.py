"""Shows a person what a run does: messages and a progress bar on stderr, from rank 0 only."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PLAIN_EVERY_S = 10.0  # between progress lines where there is no terminal

Update = Callable[[int, Mapping[str, float]], None]
"""The call update(steps done, values to show) moves the progress bar."""

_console = Console(stderr=True, highlight=False)


def is_main() -> bool:
    """Returns whether this process prints: rank 0 of a launcher (environment variable RANK), or any without a
    launcher."""
    return int(os.environ.get("RANK", "0")) == 0


def log(message: str, any_rank: bool = False) -> None:
    """Prints one line on stderr, above a running progress bar; silent on ranks > 0, but for what `any_rank` has to
    say."""
    if any_rank or is_main():
        _console.print(message, markup=False, soft_wrap=True)


def as_line(measures: Mapping[str, Any]) -> str:
    """Returns what a command measured, as one line. Example: {"label": "a", "pass@1": 0.37256} -> "label a  pass@1
    0.3726"."""
    words = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in measures.items()}
    return "  ".join(f"{name} {word}" for name, word in words.items())


def make_run_dir(path: str) -> str:
    """Creates the run directory where it is missing and returns its path. Raises ValueError if it cannot be created, or
    not written to."""
    try:
        os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ValueError(
            f"run directory {path}: {error.strerror}; set run_dir to a place that can be written"
        ) from None
    return path


def format_values(values: Mapping[str, float]) -> str:
    """Returns values as text for a progress line.

    Example: {"loss": 2.3071, "lr": 3e-05, "tokens_per_s": 12345.6} -> "loss 2.307 lr 3.00e-05 tokens/s 12,346"
    """
    return "  ".join(f"{name.replace('_per_', '/')} {_format(value)}" for name, value in values.items())


def _format(value: float) -> str:
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.2e}" if 0 < abs(value) < 1e-3 else f"{value:.4g}"


@contextmanager
def progress(total: int, done: int, description: str) -> Iterator[Update]:
    """Shows a bar over `total` steps, of which a resumed run has `done` behind it, with values and the time left.

        with progress(100, 0, "pretrain") as update:
            update(1, {"loss": 6.9, "lr": 1e-4, "tokens_per_s": 2000.0})

    Without a terminal it prints a plain line about every 10 seconds and for the last step. Silent on ranks > 0.
    """
    if not is_main():
        yield lambda step, values: None
    elif not _console.is_terminal:
        yield _plain(total, done, description)
    else:
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[values]}"), TimeElapsedColumn())
        with Progress(TextColumn(description), *columns, TimeRemainingColumn(), console=_console) as bar:
            task = bar.add_task(description, total=total, completed=done, values="")
            yield lambda step, values: bar.update(task, completed=step, values=format_values(values))


def _plain(total: int, done: int, description: str) -> Update:
    start = time.monotonic()
    last = start

    def update(step: int, values: Mapping[str, float]) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < PLAIN_EVERY_S and step < total:
            return
        last = now
        left_s = (now - start) / max(step - done, 1) * (total - step)
        log(f"{description} {step}/{total}  {format_values(values)}  {left_s:.0f} s left")

    return update
