"""Generates problem sets with verifiable answers, as JSONL files of prompts; every eighth problem is held out."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from typing import Any

from llmtrain.config.schema import TaskConfig
from llmtrain.data.arithmetic import is_held_out, worked
from llmtrain.data.jsonl import write_jsonl

Problems = Iterator[tuple[str, dict[str, Any]]]
"""A problem is (the text whose hash decides whether it is held out, its line of the file)."""


def chain_sum(task: TaskConfig, seed: int) -> Problems:
    """Yields reasoning-gym's chain_sum with two numbers of two digits; the completion works it by columns."""
    import reasoning_gym

    size = draws(task)
    rng = random.Random(f"{seed}:{task.name}")
    limits = {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2}
    for entry in reasoning_gym.create_dataset("chain_sum", size=size, seed=seed, **limits):
        expression = entry["metadata"]["expression"]
        first, operator, second = expression.split()
        completion = worked([int(first), int(second)], operator, task.error_rate, rng)
        line = {"prompt": entry["question"], "completion": completion, "answer": entry["answer"]}
        yield expression, {**line, "source": "chain_sum", "entry": entry}


def largest(task: TaskConfig, seed: int) -> Problems:
    """Yields questions for the largest of three numbers from 1 to 99; the first words of the answer are given."""
    rng = random.Random(f"{seed}:{task.name}")
    for _ in range(draws(task)):
        a, b, c = numbers = rng.sample(range(1, 100), 3)
        question = f"Which is the largest number: {a}, {b} or {c}?"
        line = {"messages": [{"role": "user", "content": question}], "prefill": "The answer is "}
        yield str(sorted(numbers)), {**line, "answer": str(max(numbers)), "source": "largest"}


PROBLEMS: dict[str, Callable[[TaskConfig, int], Problems]] = {"chain_sum": chain_sum, "largest": largest}


def draws(task: TaskConfig) -> int:
    """Returns how many random problems are tried before giving up: enough to find nearly all that exist."""
    return 20 * (task.train + 8 * task.held_out)


def write_task(task: TaskConfig, directory: str, seed: int) -> None:
    """Writes `<directory>/<name>-train.jsonl` and `<name>-held_out.jsonl`, without repeated problems or overlap.

    A line holds `prompt` (or `messages` and `prefill`), `answer`, `source`; for chain_sum also `completion` (the
    demonstration) and `entry` (what reasoning-gym scores with). Raises ValueError when there are not enough problems.
    """
    wanted = {"train": task.train, "held_out": task.held_out}
    found: dict[str, dict[str, dict[str, Any]]] = {"train": {}, "held_out": {}}
    for key, line in PROBLEMS[task.type](task, seed):
        split = "held_out" if is_held_out(key) else "train"
        if len(found[split]) < wanted[split]:
            found[split].setdefault(key, line)
        if all(len(found[s]) == wanted[s] for s in wanted):
            break
    for split, lines in found.items():
        if len(lines) < wanted[split]:
            raise ValueError(
                f"task {task.name!r}: {split}={wanted[split]}, but {task.type} yields only {len(lines)} different "
                "problems; ask for fewer"
            )
        write_jsonl(os.path.join(directory, f"{task.name}-{split}.jsonl"), lines.values())
