"""Holds the problems of an evaluation and what says how good an answer to them, or a part of one, is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from llmtrain.config.testtime import LOGPROB
from llmtrain.eval.generate import SOLVED, Classes, Judge
from llmtrain.eval.testtime.extend import Decode
from llmtrain.rewards import scorer_of, stop_if_failing
from llmtrain.rollout.generator import Generator
from llmtrain.types import Prompt, Sampling

if TYPE_CHECKING:
    from llmtrain.config.schema import RewardConfig


@dataclass(frozen=True)
class Problems:
    """Holds the problems, and the verifier that says which completions are right."""

    prompts: Sequence[Prompt]
    examples: Sequence[dict[str, Any]]  # the rows that they come from
    decode: Callable[[Sequence[int]], str]  # text of a completion, for the verifier and rewards
    judge: Judge | None  # None: an environment says it itself, and nothing but whole episodes is scored
    classes: Classes | None  # numbers of the answers of completions


@dataclass
class Written:
    """Holds what was written behind the prompt of a problem. Example: Written(0, [9, 1], [-0.1, -0.3])"""

    problem: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # under the sampling temperature


Grade = Callable[[Sequence[Written]], list[float | None]]
"""Returns scores, the higher the better; None: it has none, which is worse than any."""


class Graded(NamedTuple):
    """Holds what scores, and its kind, by which a score becomes a weight: logprob, model or reward."""

    grade: Grade
    kind: str


class Spoken(NamedTuple):
    """Holds the model that answers. `encode` makes token ids of a text, special tokens read; `decode` shows them."""

    generator: Generator
    sampling: Sampling  # as the section `rollout` says
    encode: Callable[[str], list[int]]
    decode: Decode
    room_tokens: int  # prompt and completion at most


def judged(problems: Problems, written: Sequence[Written]) -> list[bool]:
    """Returns which completions are right."""
    scores = problems.judge([(each.problem, problems.decode(each.ids)) for each in written])
    return [score.value >= SOLVED for score in scores]


def by_logprob(written: Sequence[Written]) -> list[float | None]:
    """Returns the mean log-prob of a token, in nats, under the sampling temperature; None without tokens."""
    return [fmean(each.logprobs) if each.logprobs else None for each in written]


def by_reward(reward: RewardConfig, problems: Problems) -> Grade:
    """Returns a grade: the reward of a text as if it were the whole answer; None where it failed."""
    scorer = scorer_of(reward)

    def grade(written: Sequence[Written]) -> list[float | None]:
        pairs = [(problems.decode(each.ids), problems.examples[each.problem]) for each in written]
        scores = scorer.score(pairs)
        stop_if_failing([reward], [{} if s.error is None else {reward.name: s.error} for s in scores])
        return [None if score.error is not None else score.value for score in scores]

    return grade


def by_step(scores: Callable[[Sequence[list[int]]], list[float]], most_tokens: float, problems: Problems) -> Grade:
    """Returns a grade: what a process reward model says at the last token (arXiv 2305.20050), from token ids, so that
    nothing is encoded again. `scores` are those of rows of ids; None for a row above `most_tokens`, or no number."""

    def grade(written: Sequence[Written]) -> list[float | None]:
        rows = [[*problems.prompts[each.problem].ids, *each.ids] for each in written]
        values = iter(scores([row for row in rows if len(row) <= most_tokens]))
        found = [next(values) if len(row) <= most_tokens else None for row in rows]
        return [value if value is not None and math.isfinite(value) else None for value in found]

    return grade


def weight_of(score: float | None, kind: str) -> float:
    """Returns the weight of a vote, at least 0, from its score; 0 without one.

    `logprob`: exp of the mean log-prob (arXiv 2203.11171, equation 1); `model`: the sigmoid, as a reward model gives
    log-odds; `reward`: the score itself, a negative one counts 0.
    """
    if score is None:
        return 0.0
    if kind == LOGPROB:
        return math.exp(score)
    if kind == "model":
        return 1 / (1 + math.exp(-score)) if score > -700 else 0.0  # beyond it exp overflows
    return max(0.0, score)
