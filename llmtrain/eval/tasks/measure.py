"""Measures a model on one task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llmtrain.eval.continuations import Continuation
from llmtrain.eval.generate import evaluate_problems
from llmtrain.eval.tasks.options import measure_options
from llmtrain.eval.tasks.problems import Problem
from llmtrain.eval.tasks.scoring import Judge
from llmtrain.rollout.generator import Generator
from llmtrain.types import Prompt, Sampling

Measured = tuple[dict[str, Any], list[dict[str, Any]]]
"""Holds the measures of a task, and its records for samples.jsonl."""


def measure_generation(
    judge: Judge,
    generator: Generator,
    decode: Callable[[Sequence[int]], str],
    end_ids: tuple[int, ...],
    seeds: Sequence[int],
) -> Measured:
    """Returns what the completions of a model are worth, on the task of the judge; `seeds` has one for each problem."""
    task = judge.task
    prompts = [Prompt(problem.ids, seed) for problem, seed in zip(judge.problems, seeds, strict=True)]
    sampling = Sampling(
        task.max_new_tokens, task.samples, task.temperature, task.top_p, task.top_k, end_ids, tuple(task.stop)
    )
    classes = None if judge.number is None else judge.classes
    found, records = evaluate_problems(
        generator, prompts, decode, judge.score, classes, task.samples, sampling, task.greedy
    )
    if task.extract == "reward":  # which keeps to itself what it read
        return found, records
    return found, [{**each, "answer": judge.answer(each["completion"])} for each in records]


def measure_likelihoods(
    problems: Sequence[Problem], logprobs_of: Callable[[Sequence[Continuation]], Sequence[float]]
) -> Measured:
    """Returns how often the likeliest option is right, scored by `logprobs_of` (`continuation_logprobs` of a model)."""
    rows = [pair for problem in problems for pair in problem.option_ids]
    values = iter(logprobs_of(rows))
    return measure_options(problems, [[next(values) for _ in problem.option_ids] for problem in problems])
