"""Evaluates a model on problems that it answers by sampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from statistics import fmean
from typing import Any

from llmtrain.eval.intervals import bootstrap
from llmtrain.eval.passk import ks_up_to, majority, pass_at_k
from llmtrain.rewards import Score
from llmtrain.rollout.generator import Generator
from llmtrain.types import Prompt, Sample, Sampling, attempts

SOLVED = 1.0  # reward of a right answer; a lower one is partial credit and counts as wrong

Records = list[dict[str, Any]]
Judge = Callable[[Sequence[tuple[int, str]]], Sequence[Score]]
"""Scores pairs of (problem, completion)."""

Classes = Callable[[Sequence[str]], Sequence[int | None]]


def evaluate_problems(
    generator: Generator,
    prompts: Sequence[Prompt],
    decode: Callable[[list[int]], str],
    judge: Judge | None,
    classes: Classes | None,
    samples: int,
    sampling: Sampling,
    greedy: bool = True,
    by_episode: Callable[[Sequence[Sample], Sequence[Score] | None], Sequence[Score]] | None = None,
) -> tuple[dict[str, Any], Records]:
    """Answers each prompt once greedily, where `greedy` asks for it, and `samples` times by `sampling`, whose
    `num_samples` is not used.

    `judge` scores pairs of (problem, completion); `classes` numbers the answers of completions, equal ones equally
    (None: there is none), and is None where answers cannot be compared. `by_episode` has the last word on the scores of
    episodes, and without `judge` the only one. Returns what `measures` says, with `tokens`,
    the mean length of all completions, `cut_off`, the share that no end stopped, `entropy`, the mean of -log p over the
    sampled tokens, or over the greedy ones where nothing is sampled (nats), `problems`, their number, and
    `reward_errors`, on how many completions the scorer failed; and one record for each completion, the greedy ones
    first: {"problem", "prompt", "completion", "reward", "greedy"}, and "reward_error" where the scorer failed. Raises
    ValueError without prompts. Of an episode the last turn is the completion, and `transcript` is the whole, behind
    `earlier_rows` where its history was rewritten.
    """
    if not prompts:
        raise ValueError("no problems to evaluate: raise eval.problems or fill data.held_out")
    made: list[list[list[Sample]]] = []  # of each call: the rows of each answer

    def complete(request: Sampling, greedily: bool) -> Records:
        tries = [(i, rows) for i, group in enumerate(generator.generate(prompts, request)) for rows in attempts(group)]
        made.append([rows for _, rows in tries])
        answered = [(i, decode(rows[-1].prompt_ids), decode(rows[-1].last_turn)) for i, rows in tries]
        scores = judge([(i, text) for i, _, text in answered]) if judge else None
        scores = by_episode([rows[-1] for rows in made[-1]], scores) if by_episode else scores
        whole = [transcript(rows, decode) for rows in made[-1]]
        lines = zip(answered, scores, whole, strict=True)
        return [record(*each, score) | {"greedy": greedily} | more for each, score, more in lines]

    first = complete(replace(sampling, temperature=0.0, num_samples=1), True) if greedy else []
    sampled = complete(replace(sampling, num_samples=samples), False) if samples else []
    every = list(chain.from_iterable(made))
    scores = measures(first, sampled, len(prompts), samples, classes) | {
        "entropy": -fmean(chain.from_iterable(map(sampled_logprobs, chain.from_iterable(made[-1])))),
        "tokens": fmean(sum(s.written_tokens for s in rows) for rows in every),
        "cut_off": fmean(not rows[-1].finished for rows in every),
        "problems": len(prompts),
        "reward_errors": sum("reward_error" in s for s in first + sampled),
    }
    return scores, first + sampled


def transcript(rows: Sequence[Sample], decode: Callable[[list[int]], str]) -> dict[str, Any]:
    """Returns what the record of an answer says of an episode: the whole behind its prompt, as it was seen last, and
    what was seen before its history was rewritten."""
    if len(rows) == 1 and all(rows[0].trained):
        return {}
    *earlier, last = [decode(s.ids) for s in rows]
    return {"transcript": last} | ({"earlier_rows": earlier} if earlier else {})


def sampled_logprobs(sample: Sample) -> list[float]:
    """Returns the log-probs of the tokens that the model wrote."""
    return [logprob for logprob, own in zip(sample.logprobs, sample.trained, strict=True) if own]


def measures(greedy: Records, sampled: Records, problems: int, samples: int, classes: Classes | None) -> dict[str, Any]:
    """Returns means over the problems, and under `interval` the ends of their 95 % intervals (`bootstrap`).

    They are `greedy`; `pass@k` for k of 1, 2, 4, ... and `samples`; `avg@<samples>`, the share of right samples, which
    is pass@1 by another name; and `maj@<samples>`: whether a completion with the most frequent answer is right.
    """
    groups: list[Records] = [[] for _ in range(problems)]
    for sample in sampled:
        groups[sample["problem"]].append(sample)
    values: dict[str, list[float]] = {"greedy": [float(s["reward"] >= SOLVED) for s in greedy]} if greedy else {}
    right = [sum(s["reward"] >= SOLVED for s in group) for group in groups]
    for k in ks_up_to(samples):
        values[f"pass@{k}"] = [pass_at_k(samples, c, k) for c in right]
    if samples:
        values[f"avg@{samples}"] = [c / samples for c in right]
    if samples and classes is not None:
        values[f"maj@{samples}"] = [float(majority_is_right(group, classes)) for group in groups]
    return {**{name: fmean(each) for name, each in values.items()}, "interval": bootstrap(values)}


def record(problem: int, prompt: str, completion: str, score: Score) -> dict[str, Any]:
    """Returns the line of samples.jsonl for one completion."""
    failed = {} if score.error is None else {"reward_error": score.error}
    return {"problem": problem, "prompt": prompt, "completion": completion, "reward": score.value, **failed}


def majority_is_right(group: Sequence[dict[str, Any]], classes: Classes) -> bool:
    """Says whether the vote of one problem's completions is right, by the reward of the first that gave this answer."""
    winner = majority(classes([s["completion"] for s in group]))
    return winner is not None and group[winner]["reward"] >= SOLVED
