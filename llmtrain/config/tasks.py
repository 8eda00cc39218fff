"""Defines the keys of an evaluation task, and reads task files: built-in ones and a user's own. Imports no torch."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    PositiveInt,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from llmtrain.config.document import ConfigError, Document, read_document
from llmtrain.config.explain import explain
from llmtrain.config.retrieval import StoreConfig
from llmtrain.config.section import LEAST_TEMPERATURE, DeadlineS, Section, UserPath

BUILT_IN = Path(__file__).parents[1] / "eval" / "tasks" / "files"
LANGUAGE = "{language}"  # in data.path and data.config: replaced by the key `language`
NAME = re.compile(r"[A-Za-z0-9][\w.,()+-]*")


@cache
def environment() -> Any:
    """Returns what renders templates: a Jinja sandbox in which a name that a row lacks is an error."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment

    found = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True, finalize=_not_null)
    found.filters["without"] = lambda text, pattern: re.sub(pattern, "", text)
    return found


def _not_null(value: Any) -> Any:
    """Returns what a template writes. Raises ValueError for a null, which would be written as the word None."""
    if value is None:
        raise ValueError("a value is null")
    return value


def names_in(template: str) -> set[str]:
    """Returns the names that a template reads. Example: names_in("{{question}} {{think}}") -> {"question", "think"}"""
    from jinja2 import meta

    return meta.find_undeclared_variables(environment().parse(template))


def _template(text: str) -> str:
    from jinja2 import TemplateError

    try:
        environment().from_string(text)
    except TemplateError as error:
        raise ValueError(f"is no valid Jinja template ({error}); names stand in {{{{ }}}}") from None
    return text


Template = Annotated[str, AfterValidator(_template)]
"""Text in which {{name}} stands for a field of the row; `x | without("regex")` leaves out what a pattern matches."""


Text = Annotated[str, Field(min_length=1)]
Marks = Annotated[
    list[Text], Field(min_length=2, max_length=2)
]  # what opens and what closes; no tuple, which is no JSON


OF_COMPLETIONS = (  # keys that only kind=generate reads
    *("max_new_tokens", "stop", "thoughts", "extract", "pattern", "score", "program", "deadline_s"),
    *("greedy", "samples", "temperature", "top_p", "top_k"),
)
Extract = Literal["reward", "whole", "boxed", "hashes", "letter", "number", "regex", "code"]


class TaskData(Section):
    """Says where rows come from: `path`, or `repo` of the hub, or `generator` of reasoning-gym."""

    path: UserPath | None = None  # rows in a file, directory or glob: JSONL, JSON, Parquet, CSV, as data.train
    repo: str | None = None  # a data set of the Hugging Face hub, owner/name; loaded with eval.hub alone
    config: str | None = None  # repo: its configuration; {language} is replaced
    split: str | None = None  # repo, or a directory with several
    generator: str | None = None  # name of a reasoning-gym generator
    size: PositiveInt = 100  # generator: number of problems
    seed: int = Field(0, ge=0)  # generator: which problems; another seed gives others
    settings: dict[str, Any] = Field({})  # generator: its own settings, such as {min_terms: 2}

    @property
    def place(self) -> str:
        """Returns the path for `data.files.read_rows`, with the split behind a colon."""
        parts = [self.path or self.repo or self.generator or "", self.config if self.repo else None, self.split]
        return ":".join(part for part in parts if part)


class ContextConfig(StoreConfig):
    """Names the store whose passages stand in the prompts of a task, as {{passages}}."""

    query: Template = "{{question}}"  # what is searched for, by the columns of the row


class EvalTask(Section):
    """Describes an evaluation task: a task file, or an entry of `eval.tasks`, whose keys replace those of the file that
    it names; a text alone names a built-in one. See docs/evaluation.md."""

    task: str | None = None  # a built-in file: gsm8k, math500, ...; see docs/evaluation.md
    file: UserPath | None = None  # or a task file of your own
    name: str | None = None  # in results; None = that of the file
    description: str = ""  # what it measures, for people
    data: TaskData | None = None  # the problems
    limit: PositiveInt | None = None  # only the first so many; None = all
    language: str | None = None  # replaces {language} in data.path and data.config, and {{language}} in templates
    fields: dict[str, str] = Field({})  # columns by our names: {question: problem, answer: gold}; None = by their alias
    kind: Literal["generate", "options"] = "generate"  # options: by the log-likelihoods of given answers
    prompt: Template | None = None  # what the model gets, with {{question}} and other columns
    chat: bool = False  # the prompt is a turn of the user, rendered by the tokenizer's chat template
    system: Template | None = None  # chat: the system's turn
    context: ContextConfig | None = None  # passages of your own documents, found for each row; prompt has {{passages}}
    few_shot: int = Field(0, ge=0)  # solved problems before the prompt
    examples: list[dict[str, Any]] = Field([])  # of few_shot: rows written out, the first ones are taken
    examples_from: TaskData | None = None  # of few_shot: rows of another file or split; None = the other problems
    solution: Template = "{{answer}}"  # what follows the prompt of an example; with thinking: worked see `worked`
    worked: Template = "{{worked}}"  # what follows it with thinking: worked
    between: str = "\n\n"  # plain prompts: what stands between examples
    thinking: Literal["none", "zero_shot", "worked"] = "none"  # zero_shot: {{think}} is said; worked: examples show how
    think: str = "Let's think step by step."  # zero_shot: what {{think}} stands for; else it is empty
    max_new_tokens: PositiveInt = 512  # generate: longest completion
    stop: list[Text] = Field([])  # generate: texts that end a completion, left out of it
    thoughts: list[Marks] = Field([["<think>", "</think>"]])  # around reasoning that is not scored
    extract: Extract = "reward"  # the part of a completion that is its answer; reward: as docs/rewards.md says
    pattern: str | None = None  # extract regex: its last match, group 1 if there is one
    score: Literal["math", "exact", "code", "reasoning_gym"] = "math"  # what compares it with the row's answer
    program: Template | None = None  # score code: runs in the sandbox; {{completion}} is what the model wrote
    deadline_s: DeadlineS = 5.0  # to score one completion
    greedy: bool = True  # generate: one completion at temperature 0
    samples: int = Field(0, ge=0)  # generate: completions sampled for pass@k, avg@n, maj@n
    temperature: float = Field(1.0, ge=LEAST_TEMPERATURE)  # of the samples
    top_p: float = Field(1.0, gt=0.0, le=1.0)  # of the samples: share of probability kept
    top_k: int = Field(0, ge=0)  # of the samples: most likely tokens kept; 0 = all
    choices: list[Template] = Field([])  # options: written out; empty = the row's field `choices`
    option: Template = " {{choice}}"  # options: the text that is scored behind the prompt; {{letter}} is A, B, ...
    first_option: int | None = Field(0, ge=0, le=1)  # number of the first option where answers are numbers; null: never

    @model_validator(mode="before")
    @classmethod
    def _named(cls, data: Any) -> Any:
        """Reads a text as the name of a built-in task."""
        return {"task": data} if isinstance(data, str) else data

    @field_validator("pattern")
    @classmethod
    def _expression(cls, pattern: str | None) -> str | None:
        import regex  # takes what `re` takes, and a deadline

        try:
            regex.compile(pattern or "")
        except regex.error as error:
            raise ValueError(f"is no regular expression ({error})") from None
        return pattern

    @model_serializer(mode="wrap")
    def _as_written(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Writes the keys that were written: a default written out would replace what the file says."""
        return {key: value for key, value in write(self).items() if key in self.model_fields_set}

    @property
    def label(self) -> str:
        """Returns the task's name in results."""
        return self.name or self.task or Path(self.file or "task").stem


def built_in_tasks() -> list[str]:
    """Returns the names of the built-in tasks."""
    return sorted(path.stem for path in BUILT_IN.glob("*.yaml"))


def read_task(entry: EvalTask, at: str) -> EvalTask:
    """Returns an entry of `eval.tasks` with the keys of its file under its own. `at` is the entry's own place.

    Raises ConfigError with all faults, each with the file and line of its key.
    """
    path = _file_of(entry, at)
    document = Document(where={(): at}) if path is None else read_document(path, ())
    own = {key: value for key, value in entry.model_dump(mode="json").items() if key not in ("task", "file")}
    named = [key for key in ("task", "file") if key in document.data]
    nested = [f"{document.place((key,))}: {key}: a task file names no other; write include: FILE.yaml" for key in named]
    document.data = {**document.data, **own}
    document.where |= dict.fromkeys([(key,) for key in own], at)
    document.where = {keys: place for keys, place in document.where.items() if len(keys) < 2 or keys[0] not in own}
    try:
        task = EvalTask.model_validate_json(json.dumps(document.data), strict=True)
    except ValidationError as error:
        found = [explain(EvalTask, document, fault, ()) for fault in error.errors()]
        raise ConfigError("\n".join([*nested, *found])) from None
    faults = [f"{document.place((key,))}: {key}{text}" for key, text in task_faults(task)]
    if nested or faults:
        raise ConfigError("\n".join([*nested, *faults]))
    task = task if task.name else task.model_copy(update={"name": entry.label})
    return in_language(task)


def _file_of(entry: EvalTask, at: str) -> str | None:
    if entry.task is not None and entry.file is not None:
        raise ConfigError(f"{at}: task={entry.task} and file={entry.file}: give one of them")
    if entry.task is None:
        return entry.file
    if entry.task not in built_in_tasks():
        near = difflib.get_close_matches(entry.task, built_in_tasks(), 1)
        known = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(built_in_tasks())}"
        raise ConfigError(f"{at}: task {entry.task!r}: there is no such built-in task, {known}; or give file: PATH")
    return str(BUILT_IN / f"{entry.task}.yaml")


def in_language(task: EvalTask) -> EvalTask:
    """Returns the task with {language} replaced in the places of its rows."""

    def replaced(data: TaskData | None) -> TaskData | None:
        if data is None or task.language is None:
            return data
        texts = {key: getattr(data, key) for key in ("path", "config")}
        return data.model_copy(update={k: v and v.replace(LANGUAGE, task.language) for k, v in texts.items()})

    places = {"data": replaced(task.data), "examples_from": replaced(task.examples_from)}
    return task.model_copy(update={key: value for key, value in places.items() if value is not None})


def task_faults(task: EvalTask) -> Iterator[tuple[str, str]]:
    """Yields (key, what is wrong) for what several keys of a task say together."""
    if task.prompt is None:
        yield "prompt", ': is missing; write what the model gets, such as "Question: {{question}}\\nAnswer:"'
    if task.name is not None and not NAME.fullmatch(task.name):
        yield "name", f"={task.name!r}: must be of letters, digits and -_.,()+; it names results"
    for key in ("data", "examples_from"):
        yield from ((key, text) for text in _data_faults(getattr(task, key), task))
    if task.data is None:
        yield "data", ": is missing; give {path: FILE}, {repo: OWNER/NAME, split: test} or {generator: NAME}"
    if task.context is not None and "passages" not in names_in(task.prompt or "{{passages}}"):
        yield "context", ": the prompt has no {{passages}} to show what is found in; add it to prompt"
    yield from _few_shot_faults(task)
    if task.system is not None and not task.chat:
        yield "system", ": only a chat has a system's turn; set chat: true, or remove it"
    yield from _generation_faults(task) if task.kind == "generate" else _option_faults(task)


def _data_faults(data: TaskData | None, task: EvalTask) -> Iterator[str]:
    if data is None:
        return
    given = [key for key in ("path", "repo", "generator") if getattr(data, key) is not None]
    if len(given) != 1:
        yield f": must have one of path, repo and generator, and has {' and '.join(given) or 'none'}; mend it"
    if data.repo is not None and data.split is None:
        yield f".repo={data.repo}: needs a split; add one, such as split: test"
    if task.language is None and LANGUAGE in f"{data.path} {data.config}":
        yield f": has {LANGUAGE}, and no language is given; set language, such as language: de"


def _few_shot_faults(task: EvalTask) -> Iterator[tuple[str, str]]:
    if task.examples and task.examples_from is not None:
        yield "examples_from", ": and examples are given too; remove one of them"
    elif task.examples and task.few_shot > len(task.examples):
        yield "few_shot", f"={task.few_shot}: there are only {len(task.examples)} examples; lower it, or write more"
    if task.thinking == "worked" and not task.few_shot:
        yield "thinking", "=worked: worked examples are shown with few_shot of 1 or more; raise few_shot"
    if task.thinking == "zero_shot" and "think" not in names_in(task.prompt or "{{think}}"):
        yield "thinking", "=zero_shot: the prompt has no {{think}} to say it in; add {{think}} there"


def _generation_faults(task: EvalTask) -> Iterator[tuple[str, str]]:
    if not task.greedy and not task.samples:
        yield "samples", "=0: nothing is generated with greedy: false; raise samples, or set greedy: true"
    if (task.pattern is None) == (task.extract == "regex"):
        told = "needs a pattern; add one" if task.pattern is None else "reads no pattern; remove it"
        yield "pattern", f": extract={task.extract} {told}"
    if (task.program is None) == (task.score == "code"):
        told = "needs a program, with {{completion}}" if task.program is None else "runs no program; remove it"
        yield "program", f": score={task.score} {told}"
    elif task.program is not None and "completion" not in names_in(task.program):
        yield "program", ": has no {{completion}}, so it would not run what the model wrote; add it"
    if task.score in ("exact", "code") and task.extract == "reward":
        rest = "whole, number, letter, ..." if task.score == "exact" else "code"
        yield "extract", f"=reward: score={task.score} has no reading of its own; set extract to {rest}"


def _option_faults(task: EvalTask) -> Iterator[tuple[str, str]]:
    for key in OF_COMPLETIONS:
        if key in task.model_fields_set:
            yield key, f"={getattr(task, key)}: kind=options generates nothing, and so does not read it; remove it"
    if len(task.choices) == 1:
        yield "choices", ": has one option, which is always right; write two or more"
    if not {"choice", "letter"} & names_in(task.option):
        yield "option", ": has neither {{choice}} nor {{letter}}, so all options would be the same; add one"


def same_names(tasks: Sequence[EvalTask]) -> Iterator[str]:
    """Yields the names that several tasks have."""
    names = [task.label for task in tasks]
    yield from sorted({name for name in names if names.count(name) > 1})


def tasks_of(entries: Sequence[EvalTask]) -> list[EvalTask]:
    """Returns the entries of `eval.tasks` with the keys of their files. Raises ConfigError as `read_task`."""
    return [read_task(entry, f"eval.tasks.{entry.name or i}") for i, entry in enumerate(entries)]


def files_of(entries: Sequence[EvalTask]) -> Iterator[tuple[str, str]]:
    """Yields (key, path) of the files that tasks read: a user's task files, rows and examples."""
    for i, (entry, task) in enumerate(zip(entries, tasks_of(entries), strict=True)):
        at = f"eval.tasks.{entry.name or i}"
        paths = {"file": entry.file, "data": task.data and task.data.path}
        paths["context"] = task.context and task.context.store
        paths["examples_from"] = task.examples_from and task.examples_from.path
        yield from ((f"{at}.{key}", path) for key, path in paths.items() if path is not None)
