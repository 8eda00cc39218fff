"""Checks the tasks of an evaluation: their files, and where their rows are."""

from __future__ import annotations

from collections.abc import Iterator

from llmtrain.config.document import ConfigError
from llmtrain.config.rows import is_hub_name, split_path
from llmtrain.config.tasks import EvalTask, TaskData, read_task, same_names
from llmtrain.rules.case import Case, Rules, command
from llmtrain.rules.index import store_faults


def _tasks(case: Case) -> Iterator[str]:
    tasks = []
    for i, entry in enumerate(case.config.eval.tasks):
        at = f"eval.tasks.{entry.name or i}"
        try:
            tasks.append(read_task(entry, at))
        except ConfigError as error:
            yield from str(error).splitlines()
            continue
        if tasks[-1].context is not None:
            yield from store_faults(case, f"{at}.context", tasks[-1].context)
        for key in ("data", "examples_from"):
            yield from _place(case, tasks[-1], f"{at}.{key}", getattr(tasks[-1], key))
    for name in same_names(tasks):
        yield f"eval.tasks: two are called {name!r}, which names their results; give one another `name`"


def _nothing(case: Case) -> Iterator[str]:
    asked = case.config.eval
    if not (asked.text or asked.problems or asked.tasks or asked.lm_eval.tasks):
        yield "eval.text=false: and no problems, tasks or lm_eval.tasks: nothing is measured; name one"


def _place(case: Case, task: EvalTask, key: str, data: TaskData | None) -> Iterator[str]:
    """Yields a line where rows are not there, or would be downloaded and nobody asked for it."""
    if data is None or (key.endswith("examples_from") and not task.few_shot):
        return
    if data.repo is not None and not case.config.eval.hub:
        yield (
            f"{key}.repo={data.repo}: is on the hub, and eval.hub is false, so nothing is downloaded; give "
            f"{key.rpartition('.')[2]}: {{path: FILE}}, or set eval.hub=true"
        )
    if data.repo is not None and not is_hub_name(data.repo):
        yield f"{key}.repo={data.repo}: must be owner/name, and no folder here; correct it, or give path: FILE"
    if data.path is not None and case.missing(split_path(data.path)[0]):
        yield f"{key}.path={data.path}: does not exist; give a file, directory or glob of rows"


TASK_RULES: Rules = ((command("eval"), _tasks), (command("eval"), _nothing))
