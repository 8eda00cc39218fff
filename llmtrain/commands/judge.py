"""Implements `llmtrain judge`: a model samples, judges its own samples, and preference pairs and best samples are
written, in one process."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

from llmtrain.config.load import dump
from llmtrain.config.schema import Config, RewardConfig
from llmtrain.data.asked import asking, messages_of, spoken
from llmtrain.data.prompts import PromptSet
from llmtrain.data.sampler import derive
from llmtrain.eval.continuations import continuation_logprobs
from llmtrain.eval.judging import (
    Scores,
    agreement,
    agrees_with_first,
    best_against_worst,
    best_of,
    soft_label,
    votes,
)
from llmtrain.observe.interval import wilson
from llmtrain.observe.log import as_line, log, make_run_dir
from llmtrain.observe.rows import own_directory, write_rows
from llmtrain.rewards import build_reward, check_rows, scorer_of, stop_if_failing
from llmtrain.rewards.check import row_faults
from llmtrain.rewards.rubric import filled, read_rubric, rubric_score
from llmtrain.trainer.environments import prompts_of
from llmtrain.trainer.job import resolved
from llmtrain.trainer.speaker import Question, Said, Speaker, numbers_of, open_speaker
from llmtrain.types import Group

COMMAND = "llmtrain judge"
FILES = ("config.yaml", "judge.json", "pairs.jsonl", "best.jsonl", "samples.jsonl")


@dataclass
class Judged:
    """Holds the samples of one prompt with what a judge and a verifier say of each."""

    number: int  # which prompt of the file
    group: Group
    texts: list[str]
    scores: Scores  # of the judge; None: it has none
    truth: Scores  # of the verifier; None without one


def main(config: Config) -> None:
    """Writes pairs.jsonl, best.jsonl, samples.jsonl, judge.json and config.yaml into the run directory.

    A job that was killed starts anew. Raises ValueError when the directory holds a run that trains, or files that are
    not ours.
    """
    make_run_dir(config.directory)
    with own_directory(config.directory, COMMAND, FILES) as directory:
        (directory / "config.yaml").write_text(dump(resolved(config)), encoding="utf-8")
        result = judged(config, open_speaker(config), directory)
        (directory / "judge.json").write_text(json.dumps(result, indent=2), encoding="utf-8")
    log(as_line(result))


def judged(config: Config, speaker: Speaker, directory: Path) -> dict[str, Any]:
    """Samples, judges, writes the rows, and returns the measures."""
    settings = config.judge
    prompts = prompts_of(config, config.data.train, speaker.tokenizer)
    numbers = numbers_of("judge", settings, prompts)
    judge, verifier = judge_of(speaker, prompts), verifier_of(config, prompts)
    groups = speaker.sample(prompts, numbers, "judge")
    texts = [[speaker.decode(sample.ids) for sample in group] for group in groups]
    scores = judge(groups, texts, numbers)
    truth = verified(config, verifier, groups, texts)
    chosen = [prompts.around(number, config.seed) for number in numbers]
    cases = [Judged(*each) for each in zip(chosen, groups, texts, scores, truth, strict=True)]
    write_rows(
        directory / "samples.jsonl", chain.from_iterable(sample_rows(case, speaker, settings.by) for case in cases)
    )
    pairs = [pairs_of(config, case) for case in cases]
    best = [
        best_of(case.scores, case.texts, finished(case), settings.best_per_prompt, settings.best_least)
        for case in cases
    ]
    rows = [asking(prompts.parsed[case.number], speaker.tokenizer.has_chat) for case in cases]
    write_rows(directory / "pairs.jsonl", (pair_row(config, *each) for each in flat(rows, cases, pairs)))
    write_rows(directory / "best.jsonl", ({**row, "completion": c.texts[i]} for row, c, i in flat(rows, cases, best)))
    about = {"by": settings.by, "first": numbers.start, "round": settings.round, "prompts": len(cases)}
    about["completions"] = speaker.completions
    return {**about, **counts(cases, pairs, best), **compared(cases, pairs, best, verifier)}


def flat(
    rows: Sequence[dict], cases: Sequence[Judged], found: Sequence[Sequence[Any]]
) -> list[tuple[dict, Judged, Any]]:
    """Returns (row, case, what was found) for all that was found."""
    return [(row, case, each) for row, case, own in zip(rows, cases, found, strict=True) for each in own]


def finished(case: Judged) -> list[bool]:
    """Returns which samples were not cut off."""
    return [sample.finished for sample in case.group]


def pairs_of(config: Config, case: Judged) -> list[tuple[int, int]]:
    """Returns the pairs (chosen, rejected) of one prompt."""
    return best_against_worst(case.scores, case.texts, finished(case), config.judge.pairs_per_prompt, config.judge.tie)


def pair_row(config: Config, row: dict[str, Any], case: Judged, pair: tuple[int, int]) -> dict[str, Any]:
    """Returns a line of pairs.jsonl."""
    chosen, rejected = pair
    soft = config.judge.soft
    label = {} if soft is None else {"label": soft_label(case.scores[chosen], case.scores[rejected], soft)}
    return {**row, "chosen": case.texts[chosen], "rejected": case.texts[rejected], **label}


def sample_rows(case: Judged, speaker: Speaker, label: str) -> list[dict[str, Any]]:
    """Returns the lines of samples.jsonl of one prompt."""
    return [
        {
            **{"step": 0, "label": label, "problem": case.number, "prompt": speaker.decode(sample.prompt_ids)},
            **{"completion": text, "score": score, "reward": truth, "finished": sample.finished},
        }
        for sample, text, score, truth in zip(case.group, case.texts, case.scores, case.truth, strict=True)
    ]


def counts(cases: Sequence[Judged], pairs: Sequence[list], best: Sequence[list]) -> dict[str, int]:
    """Returns what was sampled and what came of it. `ties`: prompts without a pair."""
    return {
        "samples": sum(len(case.group) for case in cases),
        "unfinished": sum(not done for case in cases for done in finished(case)),
        "unscored": sum(score is None for case in cases for score in case.scores),
        "pairs": sum(map(len, pairs)),
        "ties": sum(not own for own in pairs),
        "best": sum(map(len, best)),
    }


def compared(
    cases: Sequence[Judged], pairs: Sequence[list], best: Sequence[list], verifier: RewardConfig | None
) -> dict[str, Any]:
    """Returns how the judge agrees with the verifier: over all pairs of samples of a prompt, and over those written."""
    if verifier is None:
        return {"verifier": None}
    agreed, decided = map(sum, zip(*(agreement(case.scores, case.truth) for case in cases), strict=True))
    written = [(c.truth[w], c.truth[r]) for c, own in zip(cases, pairs, strict=True) for w, r in own]
    right, wrong = sum(w > r for w, r in written), sum(w < r for w, r in written)
    count = right + wrong
    low, high = wilson(right / count, count) if count else (None, None)
    kept = [case.truth[i] for case, own in zip(cases, best, strict=True) for i in own]
    return {
        **{"verifier": verifier.name, "agreement": agreed / decided if decided else None, "agreement_pairs": decided},
        **{"pairs_right": right, "pairs_wrong": wrong, "pairs_right_low": low, "pairs_right_high": high},
        "reward_samples": fmean(chain.from_iterable(case.truth for case in cases)),
        "reward_best": fmean(kept) if kept else None,
        "reward_errors": sum(verifier.name in sample.errors for case in cases for sample in case.group),
    }


def verifier_of(config: Config, prompts: PromptSet) -> RewardConfig | None:
    """Returns the first reward that is no model and finds in the rows what it needs; the log says why others do not."""
    for reward in config.rewards:
        if reward.verifies:
            fault = next(row_faults(reward, prompts.examples, prompts.places), None)
            if fault is None:
                return reward
            log(f"no verifier: {fault}")
    return None


def verified(
    config: Config, verifier: RewardConfig | None, groups: Sequence[Group], texts: Sequence[Sequence[str]]
) -> list[Scores]:
    """Returns the verifier's scores by prompt, None each without one."""
    if verifier is None:
        return [[None] * len(group) for group in groups]
    if config.judge.by == "reward":  # it is one of those that have scored
        return [[sample.parts[verifier.name] for sample in group] for group in groups]
    pairs = [(t, s.example) for group, own in zip(groups, texts, strict=True) for s, t in zip(group, own, strict=True)]
    found = scorer_of(verifier).score(pairs)
    for sample, score in zip(chain.from_iterable(groups), found, strict=True):
        if score.error is not None:
            sample.errors[verifier.name] = score.error
    values = iter(found)
    return [[next(values).value for _ in group] for group in groups]


Judge = Callable[[Sequence[Group], Sequence[Sequence[str]], Sequence[int]], list[Scores]]
"""Returns scores by prompt, from groups, their texts and the numbers of the prompts."""


def judge_of(speaker: Speaker, prompts: PromptSet) -> Judge:
    """Returns the judge of `judge.by`. Raises ValueError for rows or a rubric that it cannot use, before anything is
    sampled."""
    config = speaker.config
    if config.judge.by in ("reward", "model"):
        rewards = [r for r in config.rewards if r.model is not None or config.judge.by == "reward"]
        check_rows(rewards, prompts.examples, prompts.places)
        return lambda groups, texts, numbers: rewarded(rewards, speaker, groups)
    if config.judge.by == "logprob":
        return lambda groups, texts, numbers: own_logprobs(speaker, groups)
    if config.judge.by == "rubric":
        rubric = read_rubric("judge.rubric", config.judge.rubric)
        return lambda groups, texts, numbers: by_rubric(speaker, prompts, rubric, texts, numbers)
    reward = next(reward for reward in config.rewards if reward.verifies)
    classes = scorer_of(reward).classes
    if config.judge.by == "majority":
        return lambda groups, texts, numbers: [votes(classes(own)) for own in texts]
    return lambda groups, texts, numbers: by_greedy(speaker, prompts, classes, texts, numbers)


def rewarded(rewards: Sequence[RewardConfig], speaker: Speaker, groups: Sequence[Group]) -> list[Scores]:
    """Returns the sum of rewards by their weights; None where one of them failed."""
    build_reward(rewards, speaker.decode)(groups)
    stop_if_failing(rewards, [sample.errors for group in groups for sample in group])
    return [[None if sample.errors else sample.reward for sample in group] for group in groups]


def own_logprobs(speaker: Speaker, groups: Sequence[Group]) -> list[Scores]:
    """Returns the sum of the log-probs that the model gave its tokens, at temperature 1."""
    if speaker.sampling.temperature == 1.0:
        return [[sum(sample.logprobs) for sample in group] for group in groups]
    rows = [(sample.prompt_ids, sample.ids) for sample in chain.from_iterable(groups)]
    values = iter(continuation_logprobs(speaker.generator.model, rows, speaker.generator.device))
    return [[next(values) for _ in group] for group in groups]


def by_greedy(
    speaker: Speaker,
    prompts: PromptSet,
    classes: Callable[[Sequence[str]], Sequence[int | None]],
    texts: Sequence[Sequence[str]],
    numbers: Sequence[int],
) -> list[Scores]:
    """Returns 1 for samples with the answer that the model gives greedily, else 0; None where it gives none."""
    greedy = speaker.sample(prompts, numbers, "judge", greedy=True)
    likeliest = [speaker.decode(group[0].ids) for group in greedy]
    return [agrees_with_first(classes([own, *others])) for own, others in zip(likeliest, texts, strict=True)]


def by_rubric(
    speaker: Speaker, prompts: PromptSet, rubric: str, texts: Sequence[Sequence[str]], numbers: Sequence[int]
) -> list[Scores]:
    """Returns the mean score of `judge.votes` judgements; None where none of them holds a score."""
    settings, seed = speaker.config.judge, speaker.config.seed
    questions = []
    for number, own in zip(numbers, texts, strict=True):
        example = prompts.parsed[prompts.around(number, seed)]
        task = spoken(messages_of(example)) + example.prefill
        for i, text in enumerate(own):
            asked = filled(rubric, task, text)
            questions.append(Question([{"role": "user", "content": asked}], "", derive(seed, f"rubric/{number}/{i}")))
    replies = iter(speaker.answer(questions, settings.rubric_tokens, settings.votes))

    def score(judgements: list[Said] | None) -> float | None:
        found = [rubric_score(each.text, settings.lowest, settings.highest) for each in judgements or ()]
        return fmean(kept) if (kept := [each for each in found if each is not None]) else None

    return [[score(next(replies)) for _ in own] for own in texts]
