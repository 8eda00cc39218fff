"""Defines the keys of `eval.test_time`: more tokens a problem for more right answers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from llmtrain.config.section import Section

LOGPROB = "logprob"  # the score that needs no reward
Text = Annotated[str, Field(min_length=1)]
Method = Literal["majority", "weighted_majority", "best_of", "budget", "search"]
Candidates = Annotated[int, Field(ge=1, le=256)]


class BudgetConfig(Section):
    """Configures budget forcing (s1, arXiv 2501.19393): the thinking part of a completion gets a number of tokens."""

    budgets: list[PositiveInt] = Field([32, 128, 512], min_length=1)  # thinking tokens at most; each is a point
    end: Text | None = "</think>"  # text by which the model ends its thinking; null = it thinks until it stops
    close: Text = "</think>\nFinal answer:"  # put behind thinking that is cut at the budget; the model goes on from it
    wait: Text = " Wait"  # put in place of an end that comes early; its tokens count as thinking
    waits: list[Annotated[int, Field(ge=0, le=100)]] = Field([0], min_length=1)  # times at most; each is a line
    answer_tokens: PositiveInt = 64  # longest answer behind the thinking
    samples: Candidates = 1  # completions of a problem, whose accuracy is averaged
    temperature: float = Field(0.0, ge=0.0)  # of thinking and answer; 0 = greedy


class SearchConfig(Section):
    """Configures beam search over steps (arXiv 2408.03314): candidates of a step are scored, the best go on, and a vote
    that their scores weigh decides among what they end as."""

    candidates: list[Candidates] = Field([4, 16], min_length=1)  # N, of a problem at each step; each is a point
    width: PositiveInt = 4  # M, continuations of a beam; the best N / M beams go on
    stop: Text = "\n"  # text that ends a step
    step_tokens: PositiveInt = 64  # longest step; a longer one is cut there, scored and goes on
    score: str = LOGPROB  # what scores: logprob (mean a token), or the name of one of `rewards`
    read: Literal["answer", "step"] = "answer"  # as an answer that ends here; step: a reward model, at the last token


class TestTimeConfig(Section):
    """Measures accuracy against the tokens spent on a problem, on the problems of `llmtrain eval`; see
    docs/evaluation/test_time.md."""

    __test__ = False  # no test, whatever its name says to pytest

    methods: list[Method] = Field(["majority", "weighted_majority", "best_of"], min_length=1)  # see the page
    samples: Candidates = 16  # N, completions of a problem; those that vote or are ranked are 1, 2, 4, ... of them
    scores: list[str] = Field([LOGPROB], min_length=1)  # what weighs and ranks: logprob, names of `rewards`
    subsets: Annotated[int, Field(ge=2, le=1_000_000)] = 1000  # of a problem for weighted_majority; fewer: all of them
    budget: BudgetConfig = BudgetConfig()
    search: SearchConfig = SearchConfig()
