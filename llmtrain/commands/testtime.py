"""Measures `eval.test_time` in `llmtrain eval`: hands over the model, the problems and what scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from llmtrain.config.schema import Config, RewardConfig
from llmtrain.config.testtime import LOGPROB
from llmtrain.data.tokenizer import Tokenizer, load_tokenizer
from llmtrain.eval.testtime.problems import Grade, Graded, Problems, Spoken, by_logprob, by_reward, by_step
from llmtrain.eval.testtime.run import measured
from llmtrain.observe.log import as_line, log
from llmtrain.rewards import check_rows
from llmtrain.rollout.generator import Generator
from llmtrain.trainer.completions import sampling_of, stop_text


def accuracy_by_tokens(
    config: Config,
    tokenizer: Tokenizer,
    generator: Generator,
    room_tokens: int,
    problems: Problems,
    places: Sequence[str],
) -> dict[str, list[dict[str, Any]]]:
    """Returns the points of each method by the name of its line, and logs them. Prompt and completion have
    `room_tokens` at most; `places` are the file and line of each problem. Raises ValueError for rows that a reward
    cannot read, before anything is sampled."""
    settings = config.eval.test_time
    assert settings is not None
    searches = "search" in settings.methods
    ranks = {"weighted_majority", "best_of"} & set(settings.methods)
    names = {*(settings.scores if ranks else ()), *([settings.search.score] if searches else ())} - {LOGPROB}
    check_rows([reward for reward in config.rewards if reward.name in names], problems.examples, places)
    graded = {name: graded_by(config, tokenizer, problems, name) for name in (settings.scores if ranks else ())}
    guide = graded_by(config, tokenizer, problems, settings.search.score, settings.search.read) if searches else None
    sampling = sampling_of(config, tokenizer)
    model = Spoken(generator, sampling, tokenizer.encode, stop_text(tokenizer), room_tokens)
    lines = measured(settings, config.seed, model, problems, graded, guide)
    for name, points in lines.items():
        for point in points:
            log(as_line({"line": name, **{key: value for key, value in point.items() if key != "interval"}}))
    return lines


def graded_by(config: Config, tokenizer: Tokenizer, problems: Problems, name: str, read: str = "answer") -> Graded:
    """Returns what scores by this name: `logprob`, or one of the rewards. Raises ValueError when a process reward model
    cannot read the ids of the model's tokenizer."""
    if name == LOGPROB:
        return Graded(by_logprob, LOGPROB)
    reward = next(reward for reward in config.rewards if reward.name == name)
    kind = "reward" if reward.model is None else "model"
    return Graded(stepwise(reward, tokenizer, problems) if read == "step" else by_reward(reward, problems), kind)


def stepwise(reward: RewardConfig, tokenizer: Tokenizer, problems: Problems) -> Grade:
    """Returns the grade of a process reward model. Raises ValueError when it has another tokenizer."""
    from llmtrain.rewards.model import classifier_of  # imports transformers

    assert reward.model is not None
    if load_tokenizer(reward.model).fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"eval.test_time.search.read=step: the tokenizer of {reward.model} is not that of the model, whose token "
            "ids it would read; set read=answer, or take a reward model with the same tokenizer"
        )
    model = classifier_of(reward.model, reward.device_map, reward.dtype)
    return by_step(partial(model.scores, batch_tokens=reward.batch_tokens), model.most_tokens or math.inf, problems)
