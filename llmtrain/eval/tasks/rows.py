"""Reads the rows of a task, and finds in their columns what the task needs, whatever they are called."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llmtrain.config.tasks import EvalTask, TaskData
from llmtrain.data.faults import Faults
from llmtrain.data.files import read_rows
from llmtrain.data.jsonl import Record, kind
from llmtrain.data.rows import found_fields

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ALIASES: Mapping[str, tuple[str, ...]] = {  # the first column that a row has
    "question": ("question", "problem", "prompt", "query", "ctx", "instruction", "input"),
    "answer": (
        *("answer", "final_answer", "expected_answer", "answer_number", "answerKey", "label", "target", "gold"),
        *("ground_truth", "correct", "solution", "canonical_solution", "output", "completion"),
    ),
    "worked": ("worked", "solution", "rationale", "reasoning", "explanation", "canonical_solution", "answer"),
    "choices": ("choices", "options", "endings"),
}


class Fields:
    """Finds what a task calls `question`, `answer`, `worked` and `choices` in a row: by `fields`, else by aliases."""

    def __init__(self, fields: Mapping[str, str]) -> None:
        self.fields = fields

    def get(self, row: Mapping[str, Any], name: str) -> Any:
        """Returns a value. Raises ValueError, without a place, naming the columns that there are."""
        names = (self.fields[name],) if name in self.fields else ALIASES.get(name, (name,))
        for each in names:
            if row.get(each) is not None:
                return row[each]
        wanted = " or ".join(map(repr, names[:4])) + (", ..." if len(names) > 4 else "")
        told = "which `fields` names" if name in self.fields else f"name yours in the task with fields: {{{name}: ...}}"
        raise ValueError(f"no column for {name!r}: missing {wanted}, {told}; found {found_fields(row)}")

    def known(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Returns all columns of a row, and by our names what `get` finds; a name for which it finds nothing is none,
        even where the row has a column of that name."""
        ours: dict[str, Any] = {}
        for name in {**ALIASES, **self.fields}:
            try:
                ours[name] = self.get(row, name)
            except ValueError:
                continue
        lacking = {name for name in {**ALIASES, **self.fields} if name not in ours}  # an empty column of that name
        return {**{name: value for name, value in row.items() if name not in lacking}, **ours}


def rows_of(data: TaskData, limit: int | None = None) -> list[Record]:
    """Returns (place, row) of the rows at a place, the first `limit` of them.

    Raises ValueError with all faults of a file, or when there is no row, generator or data set.
    """
    if data.generator is not None:
        return generated(data, min(data.size, limit or data.size))
    faults = Faults(data.place)
    rows = read_rows(data.place, faults)
    faults.raise_any()
    return rows[:limit]


def generated(data: TaskData, size: int) -> list[Record]:
    """Returns problems of a reasoning-gym generator, with what its scorer reads. Raises ValueError when there is none
    of that name, or it refuses a setting."""
    import reasoning_gym

    try:
        made = reasoning_gym.create_dataset(data.generator, size=data.size, seed=data.seed, **data.settings)
    except (ValueError, TypeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"data.generator={data.generator}: reasoning-gym refuses it ({reason}); correct it") from None
    entries = itertools.islice(made, size)
    return [
        (f"{data.generator}:{i}", {**entry, "source": data.generator, "entry": entry})
        for i, entry in enumerate(entries, 1)
    ]


def options_of(task: EvalTask, row: Mapping[str, Any], render: Callable[[str], str]) -> tuple[list[str], list[str]]:
    """Returns (texts of the options, their labels). Options are a list, {text: [...], label: [...]} as ARC has them,
    or {label: text}. Raises ValueError, without a place, when there are none."""
    if task.choices:
        found: Any = [render(each) for each in task.choices]
    else:
        found = Fields(task.fields).get(row, "choices")
    texts, labels = texts_and_labels(found)
    if not all(isinstance(text, str) and text.strip() for text in texts) or len(texts) < 2:
        raise ValueError(f"the choices must be two or more texts that are not empty, found {found!r:.80}; mend the row")
    if len(texts) > len(LETTERS):
        raise ValueError(f"the choices are {len(texts)}: at most {len(LETTERS)} have a letter; give fewer")
    if len(labels) != len(texts):
        raise ValueError(f"the choices have {len(texts)} texts and {len(labels)} labels; mend the row")
    return texts, labels


def texts_and_labels(found: Any) -> tuple[list[Any], list[str]]:
    """Returns (texts, labels) of options in any of their forms, unchecked; nothing of another form."""

    def entries(value: Any) -> list[Any]:
        return list(value) if isinstance(value, list | tuple) else []

    if isinstance(found, Mapping) and {"text", "label"} <= found.keys():
        return entries(found["text"]), list(map(str, entries(found["label"])))
    if isinstance(found, Mapping):
        return list(found.values()), list(map(str, found))
    return entries(found), list(LETTERS[: len(entries(found))])


def right_option(answer: Any, texts: Sequence[str], labels: Sequence[str], first: int | None) -> int:
    """Returns which option is right, from 0, of an answer that is a label, else the number of an option, a letter or a
    text.

    `first` is the number of the first option, None where answers are no numbers of options. Raises ValueError, without
    a place, when it names none, or when a text is the number of one option and the text of another.
    Example: right_option("B", ["x", "y"], ["A", "B"], 0) -> 1
    """
    told = str(answer).strip()
    number = told.removesuffix(".0")
    numeric = number.isdecimal() and not isinstance(answer, bool)
    for label in (told, number):
        if label in labels:
            return labels.index(label)
    if first is not None and numeric and 0 <= int(number) - first < len(texts):
        _told_apart(answer, texts, int(number) - first)
        return int(number) - first
    if len(told) == 1 and told.upper() in LETTERS[: len(texts)]:
        return LETTERS.index(told.upper())
    if told in texts:
        return list(texts).index(told)
    raise ValueError(
        f"the answer {answer!r:.60} ({kind(answer)}) names none of the {len(texts)} options {', '.join(labels)}; mend "
        "it, or set first_option where they are counted from 1"
    )


def _told_apart(answer: Any, texts: Sequence[str], option: int) -> None:
    """Raises ValueError, without a place, when a text that is the number of an option is the text of another one."""
    told = str(answer).strip()
    if isinstance(answer, str) and told in texts and texts[option] != told:
        raise ValueError(
            f"the answer {told!r} is the number of the option {texts[option]!r:.40} and the text of another; set "
            "first_option: null where answers are texts, else give letters"
        )


def examples_of(task: EvalTask, rows: Sequence[Record], seed: int) -> list[Record]:
    """Returns the rows that few-shot examples are taken from, in the order in which they are taken: those written out
    in theirs, those of a file or of the problems themselves in one that `seed` gives.

    Raises ValueError when there are fewer than `few_shot` beside a problem itself.
    """
    if not task.few_shot:
        return []
    if task.examples:
        return [(f"{task.label}: examples.{i}", row) for i, row in enumerate(task.examples)]
    found = list(rows if task.examples_from is None else rows_of(task.examples_from))
    if len(found) < task.few_shot + (task.examples_from is None):
        source = "the problems themselves" if task.examples_from is None else task.examples_from.place
        raise ValueError(
            f"{task.label}: few_shot={task.few_shot}: there are only {len(found)} rows in {source}, and a problem is "
            "no example of itself; lower it"
        )
    random.Random(f"{seed}/{task.label}/examples").shuffle(found)
    return found
