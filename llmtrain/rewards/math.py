"""Rewards mathematical equality, as math-verify finds it, of the boxed answer or else the last line.

The check runs in a process of its own: math-verify's time limits need the main thread of a process (SIGALRM), and a
completion such as 9^{9^{9^9}} may hang where no Python signal arrives, so the process can be killed.
"""

from __future__ import annotations

import atexit
import json
import selectors
import subprocess
import sys
from functools import cache
from typing import Any

from llmtrain.rewards.math_worker import READY

DEADLINE_S = 30.0  # longer than math-verify's own limits (3 x 5 s)


def extract(completion: str) -> str | None:
    """Returns the value that math-verify reads, in a normal form. Example: "so it is \\boxed{\\frac{2}{4}}" ->
    "1/2"."""
    return ask(None, final_part(completion))["value"]


def reward(completion: str, example: dict) -> float:
    """Returns 1.0 when the answer equals `example["answer"]`, of which only the part after `####` counts (GSM8K), else
    0.0."""
    gold = str(example["answer"]).rpartition("####")[2].strip()
    return float(ask(gold, final_part(completion))["equal"])


def final_part(completion: str) -> str:
    """Returns the text from the last \\boxed on, else the last line with text: numbers in earlier steps do not
    count."""
    _, boxed, tail = completion.rpartition("\\boxed")
    return boxed + tail if boxed else completion.strip().rpartition("\n")[2]


def ask(gold: str | None, answer: str) -> dict[str, Any]:
    """Returns the worker's answer to one question. If the worker dies or misses the deadline, which kills it, the
    completion counts as unreadable."""
    if worker().poll() is not None:
        stop()
    process = worker()
    process.stdin.write(json.dumps([gold, answer]) + "\n")
    process.stdin.flush()
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        line = process.stdout.readline() if selector.select(DEADLINE_S) else ""
    if line:
        return json.loads(line)
    stop()
    return {"value": None, "equal": False}


@cache
def worker() -> subprocess.Popen[str]:
    """Returns the process, started at the first question. Raises RuntimeError when math-verify cannot be imported."""
    command = [sys.executable, "-m", "llmtrain.rewards.math_worker"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    if process.stdout.readline() != READY:
        raise RuntimeError("the reward `math` could not start math-verify (see above); pip install math-verify")
    atexit.register(process.kill)
    return process


def stop() -> None:
    """Ends the process; the next question starts another."""
    worker().kill()
    worker().wait()
    worker.cache_clear()
