"""Scores completions by one reward, in a few worker processes."""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from llmtrain.rewards import format, reasoning
from llmtrain.rewards import math as mathematics
from llmtrain.sandbox.pool import Call, Pool, Reply

if TYPE_CHECKING:
    from llmtrain.config.schema import RewardConfig
    from llmtrain.rewards.judge import JudgeScorer
    from llmtrain.rewards.model import ModelScorer

OF_PACKAGE: dict[str, ModuleType] = {"reasoning_gym": reasoning, "first_integer": format, "math": mathematics}
DEADLINE_S = 5.0  # where no configuration says another
BATCH = 32  # calls that share a process, of this package's rewards: none of them evaluates a name or a call
PACKAGE = {"math": "math-verify", "reasoning_gym": "reasoning-gym"}  # where a reward of ours comes from
MOST_WORKERS = 4  # of one reward on one rank
VOTE_DEADLINE_S = 30.0  # to compare the answers of one problem

FUNCTIONS = ("score", "extract", "classes", "warm_up", "without_scorer")  # of the modules above, where they are there

logger = logging.getLogger(__name__)


class Score(NamedTuple):
    """A score, 0.0 where the scorer failed, and then why. Example: Score(0.0, "took longer than 5 s")"""

    value: float
    error: str | None = None


def workers_of_rank() -> int:
    """Returns how many workers a rank starts: the cores shared out to the ranks of this machine, four at most."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(MOST_WORKERS, len(os.sched_getaffinity(0)) // ranks))


@functools.cache
def pool_of(name: str, function: str | None, unsandboxed: bool) -> Pool:
    """Returns the workers of one reward; it is the same for all who ask."""
    if function is not None:
        functions = {"score": absolute(function), "extract": "llmtrain.rewards.extract:final_answer"}
        return Pool(functions, workers_of_rank(), sandboxed=not unsandboxed, takes={"score": 2})
    module = OF_PACKAGE[name]
    functions = {each: f"{module.__name__}:{each}" for each in FUNCTIONS if hasattr(module, each)}
    return Pool(functions, workers_of_rank(), batch=BATCH)


def absolute(function: str) -> str:
    """Returns `file.py:function` with the whole path, `module:function` as it is."""
    place, _, name = function.rpartition(":")
    return f"{os.path.abspath(place)}:{name}" if place.endswith(".py") else function


def scorer_of(reward: RewardConfig) -> Scorer | ModelScorer | JudgeScorer:
    """Returns the scorer of a reward."""
    if reward.rubric is not None:
        from llmtrain.rewards.judge import JudgeScorer  # which reads rows, as workers do not

        return JudgeScorer(reward)
    if reward.model is not None:
        from llmtrain.rewards.model import ModelScorer  # workers import this package, and need no torch

        return ModelScorer(reward)
    return Scorer(reward.name, pool_of(reward.name, reward.function, reward.unsandboxed), reward.deadline_s)


class Scorer:
    """Asks the workers of one reward."""

    def __init__(self, name: str, pool: Pool, deadline_s: float) -> None:
        self.name, self.pool, self.deadline_s = name, pool, deadline_s

    def start(self, arguments: Sequence[Any] = ()) -> None:
        """Starts the workers; `arguments` are those of the reward's warm-up.

        Raises ValueError if a function cannot be loaded, RuntimeError if there is no sandbox here.
        """
        try:
            self.pool.start(arguments)
        except ImportError as error:
            remedy = f"; pip install {PACKAGE[self.name]}" if self.name in PACKAGE else ""
            raise ValueError(f"rewards: {self.name}: cannot be loaded{remedy}: {error}") from None

    def close(self) -> None:
        """Ends the workers; they start again when they are asked."""
        self.pool.close()

    def run(self, calls: Sequence[Call]) -> list[Reply]:
        """Returns the replies to calls, starting the workers if they are not there."""
        self.start()
        return self.pool.run(calls)

    def score(self, pairs: Sequence[tuple[str, dict[str, Any]]]) -> list[Score]:
        """Returns the scores of (completion, example) pairs; equal pairs are scored once."""
        keys = [(text, id(example)) for text, example in pairs]
        distinct = dict(zip(keys, pairs, strict=True))
        replies = self.run([Call("score", pair, self.deadline_s) for pair in distinct.values()])
        scores = {key: score_of(reply) for key, reply in zip(distinct, replies, strict=True)}
        failed = next((score.error for score in scores.values() if score.error), None)
        if failed is not None:
            warn_once(self.name, failed)
        return [scores[key] for key in keys]

    def extract(self, completion: str) -> str | None:
        """Returns the answer that the reward reads; None when there is none, or its scorer fails."""
        value = self.run([Call("extract", (completion,), self.deadline_s)])[0].value
        return value if isinstance(value, str) and value else None

    def classes(self, completions: Sequence[str]) -> list[int | None]:
        """Returns for each completion the number of its answer; equal answers have the same, None is no answer."""
        if "classes" in self.pool.functions:
            reply = self.run([Call("classes", (list(completions),), VOTE_DEADLINE_S)])[0]
            if is_classes(reply.value, len(completions)):
                return reply.value
        answers = [self.extract(completion) for completion in completions]
        numbers = {answer: n for n, answer in enumerate(dict.fromkeys(a for a in answers if a is not None))}
        return [numbers.get(answer) for answer in answers]


WARNED: set[str] = set()


def warn_once(name: str, error: str) -> None:
    """Logs the first failure of a reward."""
    if name not in WARNED:
        WARNED.add(name)
        logger.warning("reward %s failed on a completion (see reward_errors): %s", name, error)


def score_of(reply: Reply) -> Score:
    """Returns the score in a reply, which must be a finite number."""
    value = reply.value
    if reply.error is not None:
        return Score(0.0, reply.error)
    if isinstance(value, bool | int | float) and abs(value) <= sys.float_info.max:  # neither NaN nor infinite
        return Score(float(value))
    return Score(0.0, f"returned {value!r:.60}, which is no finite number")


def is_classes(value: Any, count: int) -> bool:
    """Says whether a reply is a list of `count` numbers or None."""
    return isinstance(value, list) and len(value) == count and all(v is None or type(v) is int for v in value)
