"""Trains SmolLM2-135M-Instruct to use a calculator (`configs/grpo/calculator.yaml`), by three seeds.

    python -m benchmarks.tool_use [--out benchmarks/results/tool_use.json]

The model lies in `runs/smollm2/hf`. The rows are made here: demonstrations of which one in four calls the calculator
and the others guess, and problems. What the model answers without the tool, before reinforcement learning, is
measured too.
"""

from __future__ import annotations

import random
from pathlib import Path

from benchmarks.learned import Row, report, write_rows

CONFIG = "configs/grpo/calculator.yaml"
ROWS, RUN = Path("runs/calculator-rows"), Path("runs/calculator")
DEMONSTRATIONS, PROBLEMS, HELD_OUT = 2000, 4000, 128
CALLS = 4  # one demonstration of so many calls the calculator


def product(stream: random.Random) -> tuple[str, int]:
    """Returns a product of two numbers of three digits, and its value."""
    a, b = stream.randint(100, 999), stream.randint(100, 999)
    return f"{a}*{b}", a * b


def demonstration(stream: random.Random, calls: bool) -> Row:
    """Returns a conversation in which the calculator is called, or in which the answer is a guess, and wrong."""
    asked, value = product(stream)
    guess = [{"role": "assistant", "content": str(stream.randint(10_000, 999_999))}]
    called = [
        {"role": "assistant", "content": f"calculator: {asked}"},
        {"role": "user", "content": str(value)},
        {"role": "assistant", "content": str(value)},
    ]
    return {"messages": [{"role": "user", "content": asked}, *(called if calls else guess)]}


def problem(stream: random.Random) -> Row:
    """Returns a problem with its answer."""
    asked, value = product(stream)
    return {"messages": [{"role": "user", "content": asked}], "answer": str(value)}


def make_rows(folder: Path) -> None:
    """Writes the files of rows, the same ones each time."""
    stream = random.Random(0)
    demonstrations = [demonstration(stream, calls=i % CALLS == 0) for i in range(DEMONSTRATIONS)]
    problems = [problem(stream) for _ in range(PROBLEMS + HELD_OUT)]
    rows = {"demonstrations": demonstrations, "train": problems[:PROBLEMS], "held_out": problems[PROBLEMS:]}
    write_rows(folder, rows)


if __name__ == "__main__":
    report(__doc__, "benchmarks.tool_use", CONFIG, ROWS, RUN, make_rows)
