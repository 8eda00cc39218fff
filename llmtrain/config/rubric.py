"""Defines the keys of a reward that a language model gives, by a rubric."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field, PositiveInt

from llmtrain.config.section import Count, DeadlineS, Section, UserPath
from llmtrain.config.served import reachable


class RubricConfig(Section):
    """Describes a reward that a model behind a server gives: it judges each completion by a rubric, several times, and
    the mean of its scores is the reward; see docs/rewards.md."""

    url: str  # of a server of the OpenAI protocol, as http://127.0.0.1:8000/v1
    model: str  # the name that the server gives it
    token_env: str | None = None  # the environment variable with its token; null = it wants none
    rubric: UserPath | None = None  # a text file with {prompt} and {completion}; null = the one of `llmtrain judge`
    votes: Count = 3  # judgements of a completion, whose scores are averaged
    temperature: float = Field(1.0, ge=0.0, le=2.0)  # of the judge
    max_tokens: PositiveInt = 256  # longest judgement
    lowest: float = 0.0  # lowest score that counts
    highest: float = 5.0  # highest score that counts
    deadline_s: DeadlineS = 120.0  # until the judge has answered all that a step asks; later is an error of each left
    threads: Count = 8  # requests that a rank has under way at once
    cache: UserPath | None = None  # a file that judgements are appended to, and read from; null = none is kept

    def faults(self, key: str) -> Iterator[str]:
        """Yields what is wrong with the section, `key=value: rule; remedy`."""
        yield from reachable(f"{key}.rubric.url", self.url, self.model, self.token_env)
        if self.lowest >= self.highest:
            yield f"{key}.rubric.lowest={self.lowest:g}: must be less than highest={self.highest:g}; lower it"
        if self.votes > 1 and self.temperature == 0:
            yield f"{key}.rubric.votes={self.votes}: must be 1 with temperature=0, all would be alike; change one"
