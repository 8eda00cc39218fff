"""Evaluates a model on problems that it answers by sampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Any

from llmtrain.eval.passk import majority, pass_at_k
from llmtrain.rewards import Score
from llmtrain.rollout.generator import Generator
from llmtrain.types import Prompt, Sampling

SOLVED = 1.0  # reward of a right answer; a lower one is partial credit and counts as wrong


def evaluate_problems(
    generator: Generator,
    prompts: Sequence[Prompt],
    decode: Callable[[list[int]], str],
    judge: Callable[[Sequence[tuple[int, str]]], Sequence[Score]],
    classes: Callable[[Sequence[str]], Sequence[int | None]],
    samples: int,
    sampling: Sampling,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Answers each prompt once greedily and `samples` times by `sampling`, whose `num_samples` is not used.

    `judge` scores pairs of (problem, completion); `classes` numbers the answers of completions, equal ones equally
    (None: there is none). Returns means over the problems, `greedy`, `pass@1`, `pass@<samples>` and `maj@<samples>` (a
    completion with the most frequent answer is right), with `entropy`, the mean of -log p over the sampled tokens
    (nats), `problems`, their number, and `reward_errors`, on how many completions the scorer failed; and one record for
    each completion, the greedy ones first: {"problem", "prompt", "completion", "reward", "greedy"}, and "reward_error"
    where the scorer failed. Raises ValueError without prompts.
    """
    if not prompts:
        raise ValueError("no problems to evaluate: raise eval.problems or fill data.held_out")

    def complete(request: Sampling) -> list[dict[str, Any]]:
        groups = generator.generate(prompts, request)
        surprises.append([-logprob for group in groups for s in group for logprob in s.logprobs])
        answered = [(i, decode(s.prompt_ids), decode(s.ids)) for i, group in enumerate(groups) for s in group]
        scores = judge([(i, text) for i, _, text in answered])
        return [record(*each, score) for each, score in zip(answered, scores, strict=True)]

    surprises: list[list[float]] = []  # of the tokens of each call
    greedy = complete(replace(sampling, temperature=0.0, num_samples=1))
    sampled = complete(replace(sampling, num_samples=samples))
    groups = [[s for s in sampled if s["problem"] == i] for i in range(len(prompts))]
    right = [sum(s["reward"] >= SOLVED for s in group) for group in groups]
    scores = {
        "greedy": fmean(s["reward"] >= SOLVED for s in greedy),
        "pass@1": fmean(pass_at_k(samples, c, 1) for c in right),
        f"pass@{samples}": fmean(pass_at_k(samples, c, samples) for c in right),
        f"maj@{samples}": fmean(map(partial(majority_is_right, classes=classes), groups)),
        "entropy": fmean(surprises[-1]),
        "problems": len(prompts),
        "reward_errors": sum("reward_error" in s for s in greedy + sampled),
    }
    return scores, [{**s, "greedy": True} for s in greedy] + [{**s, "greedy": False} for s in sampled]


def record(problem: int, prompt: str, completion: str, score: Score) -> dict[str, Any]:
    """Returns the line of samples.jsonl for one completion."""
    failed = {} if score.error is None else {"reward_error": score.error}
    return {"problem": problem, "prompt": prompt, "completion": completion, "reward": score.value, **failed}


def majority_is_right(
    group: Sequence[dict[str, Any]], classes: Callable[[Sequence[str]], Sequence[int | None]]
) -> bool:
    """Says whether the vote of one problem's completions is right, by the reward of the first that gave this answer."""
    winner = majority(classes([s["completion"] for s in group]))
    return winner is not None and group[winner]["reward"] >= SOLVED
