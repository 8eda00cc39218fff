"""Measures accuracy against tokens spent by every method of `eval.test_time`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from statistics import fmean
from typing import Any

from llmtrain.config.testtime import BudgetConfig, TestTimeConfig
from llmtrain.eval.testtime.budget import Forcing, forced
from llmtrain.eval.testtime.points import Line, point, rows_of
from llmtrain.eval.testtime.problems import Graded, Problems, Spoken, Written, judged, weight_of
from llmtrain.eval.testtime.samples import of_samples
from llmtrain.eval.testtime.search import Found, Steps, search
from llmtrain.eval.testtime.vote import weighted_accuracy


def measured(
    settings: TestTimeConfig,
    seed: int,
    model: Spoken,
    problems: Problems,
    graded: Mapping[str, Graded],
    guide: Graded | None,
) -> dict[str, list[dict[str, Any]]]:
    """Returns the points of each line: tokens spent on a problem, accuracy, its interval, and what was set.

    `graded` has what each of `scores` names, `guide` what guides the search. Raises ValueError for budgets and
    completions that the rows have no room for, before anything is sampled.
    """
    methods = set(settings.methods)
    if "budget" in methods:
        check_room(settings.budget, model, problems)
    if guide is not None:
        check_search_room(model, problems)
    lines: dict[str, list[dict[str, Any]]] = {}
    for name, each in chain(
        of_samples(settings, seed, model, problems, graded) if methods - {"budget", "search"} else (),
        of_budgets(settings.budget, seed, model, problems) if "budget" in methods else (),
        of_search(settings, seed, model, problems, guide) if guide is not None else (),
    ):
        lines.setdefault(name, []).append(each)
    return lines


def check_room(settings: BudgetConfig, model: Spoken, problems: Problems) -> None:
    """Raises ValueError when the longest prompt leaves no room for the largest budget and what follows it."""
    prompt = max(len(each.ids) for each in problems.prompts)
    close, budget = len(model.encode(settings.close)), max(settings.budgets)
    needed = prompt + budget + close + settings.answer_tokens
    if needed > model.room_tokens:
        raise ValueError(
            f"eval.test_time.budget.budgets={budget}: with the longest prompt ({prompt} tokens), close ({close}) and "
            f"answer_tokens={settings.answer_tokens} a row has {needed} tokens, and train.seq_len and the model have "
            f"{model.room_tokens}; lower the budget or raise seq_len"
        )


def check_search_room(model: Spoken, problems: Problems) -> None:
    """Raises ValueError when the longest prompt leaves no room for a whole completion: a step that ends at the last
    position of the model could not go on."""
    prompt, new = max(len(each.ids) for each in problems.prompts), model.sampling.max_new_tokens
    if prompt + new > model.room_tokens:
        raise ValueError(
            f"rollout.max_new_tokens={new}: with the longest prompt ({prompt} tokens) a row has {prompt + new} tokens, "
            f"and train.seq_len and the model have {model.room_tokens}; lower it for eval.test_time's search"
        )


def of_budgets(settings: BudgetConfig, seed: int, model: Spoken, problems: Problems) -> Iterator[Line]:
    """Yields a point for each budget of thinking, in a line for each number of waits."""
    sampling = replace(model.sampling, temperature=settings.temperature)
    wait, close = model.encode(settings.wait), model.encode(settings.close)
    for waits in settings.waits:
        for budget in sorted(settings.budgets):
            how = Forcing(budget, waits, settings.end, wait, close, settings.answer_tokens, model.decode)
            every = forced(model.generator, problems.prompts, settings.samples, sampling, how)
            right = judged(problems, [Written(each.problem, each.ids) for each in every])
            about = {"budget": budget, "waits": waits, "cut": fmean(each.cut for each in every)}
            about["waited"] = fmean(each.waits for each in every)
            yield (
                f"budget forcing, waits {waits}" if settings.end else "length limit",
                point(
                    [fmean(each.tokens for each in own) for own in rows_of(every, settings.samples)],
                    [fmean(own) for own in rows_of(right, settings.samples)],
                    seed,
                    **about,
                ),
            )


def of_search(settings: TestTimeConfig, seed: int, model: Spoken, problems: Problems, guide: Graded) -> Iterator[Line]:
    """Yields a point for each number of candidates: at the end their scores weigh a vote."""
    s = settings.search
    for candidates in sorted(s.candidates):
        how = Steps(candidates, s.width, s.stop, s.step_tokens, model.decode)
        found = search(model.generator, problems.prompts, model.sampling, how, guide.grade)
        verdicts = iter(judged(problems, [beam for each in found for beam in each.done]))
        accuracy = [vote_of(each, [next(verdicts) for _ in each.done], problems, guide.kind) for each in found]
        steps = fmean(each.steps for each in found)
        about = {"candidates": candidates, "width": s.width, "steps": steps}
        yield f"search by {s.score}", point([each.tokens for each in found], accuracy, seed, **about)


def vote_of(found: Found, right: Sequence[bool], problems: Problems, kind: str) -> float:
    """Returns whether the vote of what a search ended as is right, each with its last score as weight."""
    answers = problems.classes([problems.decode(beam.ids) for beam in found.done])
    weights = [weight_of(beam.score, kind) for beam in found.done]
    return weighted_accuracy(answers, weights, right, [len(right)], subsets=1, seed=0)[0][0]
