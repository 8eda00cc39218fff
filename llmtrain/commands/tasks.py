"""Evaluates the tasks of a configuration, and implements `llmtrain eval CONFIG --show`, which prints their prompts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from llmtrain.arch.resolve import resolve_model
from llmtrain.commands.weights import of_own_run
from llmtrain.config.schema import Config
from llmtrain.config.tasks import EvalTask, read_task
from llmtrain.data.sampler import derive
from llmtrain.data.tokenizer import Tokenizer
from llmtrain.eval.continuations import continuation_logprobs
from llmtrain.eval.tasks.measure import Measured, measure_generation, measure_likelihoods
from llmtrain.eval.tasks.passages import told
from llmtrain.eval.tasks.problems import Problem, encode_problems, read_problems
from llmtrain.eval.tasks.scoring import Judge
from llmtrain.eval.tasks.show import shown
from llmtrain.model.decoder import Decoder
from llmtrain.parallel.device import rank_device
from llmtrain.rollout.generator import Generator
from llmtrain.trainer.completions import completion_text, sampling_of
from llmtrain.trainer.job import open_tokenizer

Prepared = tuple[EvalTask, list[Problem]]


def show(config: Config) -> None:
    """Prints the first prompts of each task, with their answers and tokens, without weights. Raises ValueError without
    tasks."""
    if not config.eval.tasks:
        raise ValueError("eval.tasks: is empty, so --show has no prompts to show; name tasks, such as [gsm8k]")
    meant = of_own_run(config)
    tokenizer = open_tokenizer(meant)
    for task, problems in prepared(meant, tokenizer):
        print("\n".join(shown(task, problems, tokenizer)), flush=True)


def prepared(config: Config, tokenizer: Tokenizer) -> list[Prepared]:
    """Returns the tasks of a configuration, and their problems with tokens. Raises ValueError with all faults of the
    rows of a task."""
    most_tokens, found = resolve_model(config.model).max_positions, []
    for i, entry in enumerate(config.eval.tasks):
        task = read_task(entry, f"eval.tasks.{entry.name or i}")
        problems = read_problems(task, config.seed)
        encode_problems(task, problems, tokenizer, most_tokens)
        found.append((task, problems))
    return found


def judges_of(tasks: Sequence[Prepared]) -> list[Judge | None]:
    """Returns what scores the completions of each task, None for options, before the first task is measured. Raises as
    `Judge` does."""
    return [None if task.kind == "options" else Judge(task, problems) for task, problems in tasks]


def task_scores(
    config: Config,
    tasks: Sequence[Prepared],
    judges: Sequence[Judge | None],
    model: Decoder,
    tokenizer: Tokenizer,
    generator: Generator,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Returns the measures of each task by its name, and the records of all, each with its `task`. `generator` samples
    from `model`, which itself scores options."""
    scores, records = {}, []
    for (task, problems), judge in zip(tasks, judges, strict=True):
        scores[task.label], own = task_score(config, task, problems, judge, model, tokenizer, generator)
        records += [{"task": task.label, **each, **_found(problems[each["problem"]])} for each in own]
    return scores, records


def _found(problem: Problem) -> dict[str, Any]:
    """Returns what a record says of the passages that were found for its problem."""
    return {"passages": told(problem.passages)} if problem.passages else {}


def task_score(
    config: Config,
    task: EvalTask,
    problems: Sequence[Problem],
    judge: Judge | None,
    model: Decoder,
    tokenizer: Tokenizer,
    generator: Generator,
) -> Measured:
    """Returns the measures and the records of one task."""
    if judge is None:
        return measure_likelihoods(problems, partial(continuation_logprobs, model, device=rank_device()))
    seeds = [derive(config.seed, f"eval/{task.label}/{i}") for i in range(len(problems))]
    ends = sampling_of(config, tokenizer).stop_ids
    return measure_generation(judge, generator, completion_text(config, tokenizer), ends, seeds)
