"""Evaluates a model on problems that it answers by sampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from llmtrain.eval.passk import majority, pass_at_k
from llmtrain.rollout.generator import Generator
from llmtrain.types import Prompt, Sampling

SOLVED = 1.0  # reward of a right answer; a lower one is partial credit and counts as wrong


def evaluate_problems(
    generator: Generator,
    prompts: Sequence[Prompt],
    decode: Callable[[list[int]], str],
    reward: Callable[[int, str], float],
    answer: Callable[[str], str | None],
    gold: Callable[[int], str],
    samples: int,
    sampling: Sampling,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Answers each prompt once greedily and `samples` times by `sampling`, whose `num_samples` is not used.

    `reward(i, text)` and `gold(i)` judge problem i; `answer(text)` extracts the answer of a completion (None: there is
    none). Returns means over the problems, `greedy`, `pass@1`, `pass@<samples>` and `maj@<samples>` (the most frequent
    answer is the gold one), with `problems`, their number; and one record for each completion, the greedy ones first:
    {"problem", "prompt", "completion", "reward", "greedy"}. Raises ValueError without prompts.
    """
    if not prompts:
        raise ValueError("no problems to evaluate: raise eval.problems or fill data.held_out")

    def complete(request: Sampling) -> list[dict[str, Any]]:
        answered = (
            (i, s.prompt_ids, decode(s.ids)) for i, g in enumerate(generator.generate(prompts, request)) for s in g
        )
        return [
            {"problem": i, "prompt": decode(prompt_ids), "completion": text, "reward": reward(i, text)}
            for i, prompt_ids, text in answered
        ]

    greedy = complete(replace(sampling, temperature=0.0, num_samples=1))
    sampled = complete(replace(sampling, num_samples=samples))
    groups = [[s for s in sampled if s["problem"] == i] for i in range(len(prompts))]
    right = [sum(s["reward"] >= SOLVED for s in group) for group in groups]
    votes = [majority([answer(s["completion"]) for s in group]) for group in groups]
    scores = {
        "greedy": fmean(s["reward"] >= SOLVED for s in greedy),
        "pass@1": fmean(pass_at_k(samples, c, 1) for c in right),
        f"pass@{samples}": fmean(pass_at_k(samples, c, samples) for c in right),
        f"maj@{samples}": fmean(vote == gold(i) for i, vote in enumerate(votes)),
        "problems": len(prompts),
    }
    return scores, [{**s, "greedy": True} for s in greedy] + [{**s, "greedy": False} for s in sampled]
