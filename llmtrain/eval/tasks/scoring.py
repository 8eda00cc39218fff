"""Scores completions of a task: with the rewards of `llmtrain.rewards`, by equality, or by the tests of a row."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from llmtrain.config.sampling import RewardConfig
from llmtrain.config.tasks import EvalTask
from llmtrain.data.faults import Faults
from llmtrain.eval.tasks.answers import extractor, normal, until_stop, without_thoughts
from llmtrain.eval.tasks.problems import Problem, render
from llmtrain.eval.tasks.rows import LETTERS, options_of, right_option
from llmtrain.rewards import Score, check_rows, scorer_of
from llmtrain.rewards.extract import gold_text
from llmtrain.rewards.scorer import workers_of_rank
from llmtrain.sandbox.pool import Call, Pool

Scores = Callable[[Sequence[tuple[int, str]]], list[Score]]
"""Scores pairs of (problem, answer)."""
Classes = Callable[[Sequence[str]], Sequence[int | None]]
"""Numbers the answers of completions, equal ones equally; None: there is none."""


class Judge:
    """Scores the completions of a task. It starts the workers that it needs.

    Raises ValueError that lists the rows which cannot be scored, RuntimeError without a sandbox.
    """

    def __init__(self, task: EvalTask, problems: Sequence[Problem]) -> None:
        self.task, self.problems = task, problems
        self.extract = extractor(task.extract, task.pattern, task.deadline_s)
        self.read = functools.cache(self._read)  # answers are read to score, to vote and for the records
        self.prompt = problems[0].text  # all prompts of a task end alike, and so does what they open
        self.compare, self.number = MAKERS[task.score](task, problems)

    def answer(self, completion: str) -> str | None:
        """Returns the answer in a completion: up to a stop text, behind its reasoning, by the rule `extract`."""
        return self.read(completion)[0]

    def _read(self, completion: str) -> tuple[str | None, str | None]:
        """Returns (answer, why the task's pattern found none in time)."""
        ended = until_stop(completion, self.task.stop)
        try:
            return self.extract(without_thoughts(ended, self.task.thoughts, self.prompt)), None
        except TimeoutError:
            return None, f"pattern: took longer than {self.task.deadline_s:g} s"

    def score(self, pairs: Sequence[tuple[int, str]]) -> list[Score]:
        """Returns the scores of pairs of (problem, completion); 1 is right, and 0 is one without an answer."""
        answers = [(i, *self.read(text)) for i, text in pairs]
        found = [(i, answer) for i, answer, _ in answers if answer is not None]
        scores = iter(self.compare(found)) if found else iter(())
        return [Score(0.0, error) if answer is None else next(scores) for _, answer, error in answers]

    def classes(self, completions: Sequence[str]) -> list[int | None]:
        """Returns for each completion the number of its answer, equal ones equal; None: it has none."""
        assert self.number is not None, "this score compares no answers"
        answers = [self.answer(text) for text in completions]
        numbers = iter(self.number([answer for answer in answers if answer is not None]))
        return [None if answer is None else next(numbers) for answer in answers]


def by_reward(name: str, task: EvalTask, problems: Sequence[Problem]) -> tuple[Scores, Classes]:
    """Returns how a reward of ours scores. What `extract` found is handed over marked as the answer."""
    reward = RewardConfig(name=name, deadline_s=task.deadline_s)
    rows = [p.values if name == "reasoning_gym" else {"answer": p.gold} for p in problems]
    check_rows([reward], rows, [p.where for p in problems])
    scorer = scorer_of(reward)

    def marked(answer: str) -> str:
        return answer if task.extract in ("reward", "whole") else f"<answer>{answer}</answer>"

    def scores(pairs: Sequence[tuple[int, str]]) -> list[Score]:
        return scorer.score([(marked(answer), rows[i]) for i, answer in pairs])

    return scores, lambda answers: scorer.classes([marked(answer) for answer in answers])


def by_equality(task: EvalTask, problems: Sequence[Problem]) -> tuple[Scores, Classes]:
    """Returns how answers are compared as texts, their white space normal; of choices by their letter where `extract`
    finds letters."""
    golds = for_all(task, problems, functools.partial(gold_of, task))

    def scores(pairs: Sequence[tuple[int, str]]) -> list[Score]:
        return [Score(float(normal(answer) == golds[i])) for i, answer in pairs]

    return scores, lambda answers: _numbers([normal(answer) for answer in answers])


def gold_of(task: EvalTask, problem: Problem) -> str:
    """Returns the right answer as exact matching compares it. Raises ValueError, without a place, where there is
    none."""
    if task.extract == "letter" and (task.choices or "choices" in problem.values):
        texts, labels = options_of(task, problem.values, functools.partial(render, values=problem.values))
        return LETTERS[right_option(problem.gold, texts, labels, task.first_option)]
    told = gold_text(problem.gold)
    if told is None:
        raise ValueError(f"the answer {problem.gold!r:.60} is no number or text that is not empty; mend the row")
    return normal(told)


def for_all(task: EvalTask, problems: Sequence[Problem], make: Callable[[Problem], str]) -> list[str]:
    """Returns what `make` makes of each problem. Raises ValueError with a line for each on which it fails."""
    faults, made = Faults(task.label), []
    for problem in problems:
        try:
            made.append(make(problem))
        except ValueError as error:
            faults.add(problem.where, f"task {task.label}: {error}")
    faults.raise_any()
    return made


def by_tests(task: EvalTask, problems: Sequence[Problem]) -> tuple[Scores, None]:
    """Returns how code is scored: right where the task's `program` runs to its end in the sandbox without an error."""
    for_all(task, problems, lambda problem: program_of(task, problem, ""))
    pool = program_pool()
    pool.start()

    def scores(pairs: Sequence[tuple[int, str]]) -> list[Score]:
        programs = [program_of(task, problems[i], code) for i, code in pairs]
        replies = pool.run([Call("run", (program,), task.deadline_s) for program in programs])
        return [Score(float(passed(reply.value))) for reply in replies]

    return scores, None


@functools.cache
def program_pool() -> Pool:
    """Returns the workers that run programs, each in a process of its own."""
    return Pool({"run": "llmtrain.sandbox.program:run"}, workers_of_rank())


def passed(value: Any) -> bool:
    """Says whether a program reached its end without an error. One that ends early, as with sys.exit(0), has not, and
    one that took too long has no value."""
    return isinstance(value, dict) and value.get("ended") is True and value.get("error") is None


def program_of(task: EvalTask, problem: Problem, code: str) -> str:
    """Returns the program of a task with what the model wrote. Raises ValueError, without a place, where the row lacks
    something."""
    return render(task.program or "", {**problem.values, "completion": code})


def _numbers(answers: Sequence[str]) -> list[int | None]:
    firsts = {answer: n for n, answer in enumerate(dict.fromkeys(answers))}
    return [firsts[answer] for answer in answers]


MAKERS: dict[str, Callable[[EvalTask, Sequence[Problem]], tuple[Scores, Classes | None]]] = {
    "math": functools.partial(by_reward, "math"),
    "reasoning_gym": functools.partial(by_reward, "reasoning_gym"),
    "exact": by_equality,
    "code": by_tests,
}
