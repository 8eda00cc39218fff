"""Chooses among given options by their log-likelihoods. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from llmtrain.eval.intervals import bootstrap
from llmtrain.eval.tasks.problems import Problem

TIE_NATS = 1e-6  # a token; what a batch rounds differently must not choose another option


def measure_options(problems: Sequence[Problem], logprobs: Sequence[Sequence[float]]) -> tuple[dict[str, Any], list]:
    """Returns the accuracies of choosing the likeliest option, and a record for each problem.

    `logprobs` holds for each problem the sums of the log-probs of its options, in nats. `acc` compares the sums,
    `acc_tokens` the sums by the number of tokens, `acc_bytes` by the UTF-8 bytes of the option without the spaces
    before it. Options that differ by no more than 1e-6 nats a token are a tie, which the first of them wins; an option
    with the text of the right one is right. `interval` holds the ends of the 95 % intervals (`bootstrap`).
    """
    values: dict[str, list[float]] = {"acc": [], "acc_tokens": [], "acc_bytes": []}
    records = []
    for i, (problem, sums) in enumerate(zip(problems, logprobs, strict=True)):
        tokens = [len(following) for _, following in problem.option_ids]
        sizes = {"acc": [1] * len(sums), "acc_tokens": tokens, "acc_bytes": [bytes_of(o) for o in problem.options]}
        chosen = {name: likeliest(sums, tokens, size) for name, size in sizes.items()}
        for name, option in chosen.items():
            values[name].append(float(problem.options[option] == problem.options[problem.gold]))
        told = {"problem": i, "prompt": problem.text, "completion": problem.options[chosen["acc"]]}
        records.append({**told, "reward": values["acc"][-1], "logprobs": list(sums), "right": problem.gold})
    means = {name: fmean(each) for name, each in values.items()}
    return {**means, "interval": bootstrap(values), "problems": len(problems)}, records


def likeliest(sums: Sequence[float], tokens: Sequence[int], sizes: Sequence[int]) -> int:
    """Returns which option has the highest sum / size; of those that tie with it the first.

    Example: likeliest([-2.0, -3.0], [1, 2], [1, 2]) -> 1
    """
    means = [total / size for total, size in zip(sums, sizes, strict=True)]
    best = max(range(len(means)), key=means.__getitem__)
    near = (TIE_NATS * max(n, tokens[best]) / min(size, sizes[best]) for n, size in zip(tokens, sizes, strict=True))
    return next(i for i, (mean, slack) in enumerate(zip(means, near, strict=True)) if mean >= means[best] - slack)


def bytes_of(option: str) -> int:
    """Returns the UTF-8 bytes of an option without the spaces before it, at least 1."""
    return max(1, len(option.lstrip().encode()))
