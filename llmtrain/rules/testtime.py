"""Checks the section `eval.test_time`. Each rule yields lines with value, rule and remedy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from llmtrain.config.testtime import LOGPROB, TestTimeConfig
from llmtrain.rules.case import Case, Rules


def _measures(case: Case) -> bool:
    return case.command == "eval" and case.config.eval.test_time is not None


def _settings(case: Case) -> TestTimeConfig:
    assert case.config.eval.test_time is not None
    return case.config.eval.test_time


def _problems(case: Case) -> Iterator[str]:
    if not case.config.eval.problems:
        yield "eval.test_time: needs problems, and eval.problems=0; raise it or remove test_time"


def _scores(case: Case) -> Iterator[str]:
    settings, names = _settings(case), [reward.name for reward in case.config.rewards]
    asked = [("eval.test_time.scores", name) for name in settings.scores]
    asked += [("eval.test_time.search.score", settings.search.score)] if "search" in settings.methods else []
    for key, name in asked:
        if name != LOGPROB and name not in names:
            yield (
                f"{key}={name}: must be logprob or the name of one of rewards, which are {', '.join(names)}; add one, "
                f"such as {{model: DIRECTORY, name: {name}}}"
            )


def _twice(case: Case) -> Iterator[str]:
    settings = _settings(case)
    lists: dict[str, Sequence[object]] = {
        "methods": settings.methods,
        "scores": settings.scores,
        "budget.budgets": settings.budget.budgets,
        "budget.waits": settings.budget.waits,
        "search.candidates": settings.search.candidates,
    }
    for key, values in lists.items():
        if twice := [value for value in values if values.count(value) > 1]:
            yield f"eval.test_time.{key}={twice[0]}: must not stand there twice; remove one"


def _search(case: Case) -> Iterator[str]:
    settings = _settings(case)
    search, models = settings.search, [r.name for r in case.config.rewards if r.model is not None]
    if "search" not in settings.methods:
        return
    if unfit := [n for n in search.candidates if n % search.width]:
        yield (
            f"eval.test_time.search.candidates={unfit[0]}: must be a multiple of width={search.width}, as N / M beams "
            "go on; change one of them"
        )
    if search.read == "step" and search.score not in models:
        yield (
            f"eval.test_time.search.read=step: reads a reward model at the last token of a step, and score="
            f"{search.score} is none; set score to a reward that is a model, or read=answer"
        )


def _budget(case: Case) -> Iterator[str]:
    settings = _settings(case)
    budget, limit = settings.budget, case.config.train.seq_len
    if "budget" not in settings.methods:
        return
    if case.model is not None:
        limit = min(limit, case.model.max_positions)
    if max(budget.budgets) + budget.answer_tokens >= limit:
        yield (
            f"eval.test_time.budget.budgets={max(budget.budgets)}: with answer_tokens={budget.answer_tokens} must be "
            f"less than {limit}, the smaller of train.seq_len and model.max_positions, which hold the prompt too; "
            "lower it, or raise them"
        )
    if budget.end is None and max(budget.waits):
        yield (
            f"eval.test_time.budget.waits={max(budget.waits)}: a wait stands in place of the end of thinking, and end="
            "null says there is none; set end, such as </think>, or waits=[0]"
        )
    if budget.temperature == 0 and budget.samples > 1:
        yield (
            f"eval.test_time.budget.samples={budget.samples}: are all the same with temperature=0, which is greedy; "
            "raise the temperature or set samples=1"
        )


TEST_TIME_RULES: Rules = tuple((_measures, rule) for rule in (_problems, _scores, _twice, _search, _budget))
