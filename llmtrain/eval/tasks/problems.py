"""Makes the prompts of a task: rows rendered by its templates, behind solved examples, as text or as a chat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from llmtrain.config.tasks import EvalTask, environment, names_in
from llmtrain.data.encode import Draft, Encoder, Piece
from llmtrain.data.faults import Faults
from llmtrain.data.jsonl import Record
from llmtrain.data.rows import Example, Text
from llmtrain.data.search.store import Hit
from llmtrain.data.tokenizer import Tokenizer
from llmtrain.eval.tasks.passages import Find, finder_of, passages_text
from llmtrain.eval.tasks.rows import LETTERS, Fields, examples_of, options_of, right_option, rows_of


@dataclass
class Problem:
    """Holds one problem of a task, as the model gets it.

    Example: Problem("test.jsonl:1", {"question": "2+2?", ...}, "Question: 2+2?\\nAnswer:", gold="4", ids=[...])
    """

    where: str  # file:line
    values: dict[str, Any]  # the row's columns, and by our names what they hold
    prompt: Text  # a text, or the turns of a chat
    gold: Any  # the right answer; of options the number of the right one
    options: list[str] = field(default_factory=list)  # texts that are scored behind the prompt
    ids: list[int] = field(default_factory=list)  # tokens of the prompt
    text: str = ""  # what they spell, special tokens among them
    option_ids: list[tuple[list[int], list[int]]] = field(default_factory=list)  # (given, following) of each option
    passages: list[Hit] = field(default_factory=list)  # found in the store of the task, and shown in the prompt


def read_problems(task: EvalTask, seed: int) -> list[Problem]:
    """Returns the problems of a task, without tokens. `seed` orders the rows that examples are taken from.

    Raises ValueError with all faults of its rows, each with its place and the columns that there are.
    """
    assert task.data is not None
    every = rows_of(task.data, None if uses_own_rows(task) else task.limit)
    examples, faults, problems = examples_of(task, every, seed), Faults(task.data.place), []
    find = finder_of(task)
    shown = _Shown(task, examples, find)
    for where, row in every[: task.limit]:
        try:
            problems.append(_problem(task, where, row, shown, find))
        except ValueError as error:
            faults.add(where, f"task {task.label}: {error}")
    faults.raise_any()
    return problems


def uses_own_rows(task: EvalTask) -> bool:
    """Says whether examples are taken from the problems themselves, all of which are read then."""
    return task.few_shot > 0 and not task.examples and task.examples_from is None


def _problem(task: EvalTask, where: str, row: dict[str, Any], shown: _Shown, find: Find | None) -> Problem:
    values, hits = with_passages(task, context(task, row), find)
    question = render(task.prompt or "", values)
    problem = Problem(where, values, prompt_of(task, values, question, shown.beside(row, question)), None)
    problem.passages = hits
    if task.kind == "options":
        texts, labels = options_of(task, row, partial(render, values=values))
        problem.options = [
            render(task.option, {**values, "choice": t, "letter": LETTERS[i]}) for i, t in enumerate(texts)
        ]
        if task.chat:  # where they begin a turn
            problem.options = [option.lstrip() for option in problem.options]
        problem.gold = right_option(Fields(task.fields).get(row, "answer"), texts, labels, task.first_option)
        _move_spaces(problem)
    elif task.score not in ("code", "reasoning_gym"):
        problem.gold = Fields(task.fields).get(row, "answer")
    return problem


def _move_spaces(problem: Problem) -> None:
    """Moves spaces from the end of a plain prompt to the start of the options: tokens begin with a space."""
    if isinstance(problem.prompt, str):
        bare = problem.prompt.rstrip(" ")
        problem.options = [problem.prompt[len(bare) :] + option for option in problem.options]
        problem.prompt = bare


def context(task: EvalTask, row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what templates of a task may name: the columns, our names, and `think`, `letters` and `language`."""
    think = task.think if task.thinking == "zero_shot" else ""
    values = {"think": think, "letters": LETTERS, "language": task.language, **Fields(task.fields).known(row)}
    if isinstance(values.get("choices"), Mapping):
        values["choices"] = options_of(task, row, str)[0]
    return values


def with_passages(task: EvalTask, values: dict[str, Any], find: Find | None) -> tuple[dict[str, Any], list[Hit]]:
    """Returns (values with `passages`, what was found for them), both as they are where the task has no store."""
    if find is None or task.context is None:
        return values, []
    hits = find(render(task.context.query, values))
    return {**values, "passages": passages_text(hits)}, hits


def render(template: str, values: Mapping[str, Any]) -> str:
    """Returns a template filled in. Raises ValueError, without a place, when the row lacks a name or it fails."""
    from jinja2 import UndefinedError

    try:
        return _compiled(template).render(values)
    except UndefinedError:
        missing = sorted(names_in(template) - values.keys()) or ["a part of a field"]
        raise ValueError(f"the template {template!r:.60} reads {missing[0]}; found {', '.join(values)}") from None
    except Exception as error:  # a filter or an operation that the values do not allow
        reason = " ".join(str(error).split())
        raise ValueError(f"the template {template!r:.60} cannot be filled in ({reason}); mend it") from None


def _compiled(template: str) -> Any:
    return environment().from_string(template)


class _Shown:
    """Holds the examples of a task, rendered once."""

    def __init__(self, task: EvalTask, examples: Sequence[Record], find: Find | None) -> None:
        self.few_shot, self.examples = task.few_shot, []
        solution = task.worked if task.thinking == "worked" else task.solution
        for where, row in examples[: 4 * task.few_shot + 4]:  # a few may ask what a problem asks
            try:
                values, _ = with_passages(task, context(task, row), find)
                question = render(task.prompt or "", values)
                self.examples.append((row, question, render(solution, self._answered(task, values, row))))
            except ValueError as error:
                raise ValueError(f"{where}: task {task.label}: an example: {error}") from None

    @staticmethod
    def _answered(task: EvalTask, values: dict[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the values of an example; of options `answer` is the right text."""
        if task.kind != "options":
            return values
        texts, labels = options_of(task, row, partial(render, values=values))
        right = right_option(Fields(task.fields).get(row, "answer"), texts, labels, task.first_option)
        chosen = {"choice": texts[right], "letter": LETTERS[right]}
        return {**values, **chosen, "answer": render(task.option, {**values, **chosen}).lstrip()}

    def beside(self, row: Mapping[str, Any], question: str) -> list[tuple[str, str]]:
        """Returns (prompt, solution) of the first `few_shot` examples that do not ask what this row asks."""
        others = [(asked, told) for own, asked, told in self.examples if own is not row and asked != question]
        if len(others) < self.few_shot:
            raise ValueError(
                f"few_shot={self.few_shot}: only {len(others)} examples ask something else than this row; lower it, or "
                "give more examples"
            )
        return others[: self.few_shot]


def prompt_of(task: EvalTask, values: Mapping[str, Any], question: str, examples: Sequence[tuple[str, str]]) -> Text:
    """Returns what the model gets: examples and question as one text, or as turns of a chat."""
    if not task.chat:
        solved = [asked + joint(asked, told) + told for asked, told in examples]
        return task.between.join([*solved, question])
    turns = [{"role": "system", "content": render(task.system, values)}] if task.system is not None else []
    for asked, told in examples:
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": told.strip()}]
    return [*turns, {"role": "user", "content": question}]


def joint(asked: str, told: str) -> str:
    """Returns the space between a plain prompt and its solution, where neither has one."""
    return "" if not asked or asked[-1].isspace() or told[:1].isspace() else " "


def encode_problems(task: EvalTask, problems: Sequence[Problem], tokenizer: Tokenizer, most_tokens: int) -> None:
    """Sets the tokens of all problems, of options each with its own.

    `most_tokens` is the longest row of the model. Raises ValueError with all problems that are longer, with
    `max_new_tokens` behind them.
    """
    examples = [Example(p.values, p.prompt) for p in problems]
    encoder = Encoder(tokenizer, examples, False)
    faults = Faults(task.label)
    drafts = []
    for problem, example in zip(problems, examples, strict=True):
        try:
            drafts.append(encoder.prompt(example))
        except ValueError as error:
            faults.add(problem.where, f"task {task.label}: {error}")
    faults.raise_any()
    for problem, (ids, _) in zip(problems, encoder.encode(drafts), strict=True):
        problem.ids, problem.text = ids, tokenizer.decode(ids, skip_special=False)
    _encode_options(problems, drafts, encoder)
    for problem in problems:
        room = _room_fault(task, problem, most_tokens)
        if room is not None:
            faults.add(problem.where, f"task {task.label}: {room}")
    faults.raise_any()


def _encode_options(problems: Sequence[Problem], drafts: Sequence[Draft], encoder: Encoder) -> None:
    """Sets (given, following) tokens of each option, which is encoded as a text that goes on behind the prompt."""
    pairs = [(p, d, option) for p, d in zip(problems, drafts, strict=True) for option in p.options]
    longer = (d._replace(pieces=[*d.pieces, Piece(o, [(0, len(o))], goes_on=True)]) for _, d, o in pairs)
    for (problem, _, _), (ids, following) in zip(pairs, encoder.encode(longer), strict=True):
        first = len(ids) - sum(following)
        problem.option_ids.append((ids[:first], ids[first:]))


def _room_fault(task: EvalTask, problem: Problem, most_tokens: int) -> str | None:
    if not problem.ids:
        return "the prompt is empty; mend the template or the row"
    options = max((len(following) for _, following in problem.option_ids), default=0)
    behind = options if task.kind == "options" else task.max_new_tokens
    if len(problem.ids) + behind <= most_tokens:
        return None
    what = "its longest option" if task.kind == "options" else "max_new_tokens"
    return (
        f"the prompt has {len(problem.ids)} tokens, and with {behind} of {what} it is longer than "
        f"model.max_positions={most_tokens}; lower few_shot{', context.k' if task.context else ''} or max_new_tokens"
    )
