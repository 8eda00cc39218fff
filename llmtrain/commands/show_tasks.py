"""Implements `llmtrain eval CONFIG --show`: the prompts of the tasks, without loading weights or writing anything."""

from __future__ import annotations

from llmtrain.arch.resolve import resolve_model
from llmtrain.commands.weights import of_own_run
from llmtrain.config.schema import Config
from llmtrain.config.tasks import EvalTask, read_task
from llmtrain.data.tokenizer import Tokenizer
from llmtrain.eval.tasks.problems import Problem, encode_problems, read_problems
from llmtrain.eval.tasks.show import shown
from llmtrain.trainer.job import open_tokenizer


def main(config: Config) -> None:
    """Prints the first prompts of each task, with their answers and tokens. Raises ValueError without tasks."""
    if not config.eval.tasks:
        raise ValueError("eval.tasks: is empty, so --show has no prompts to show; name tasks, such as [gsm8k]")
    meant = of_own_run(config)
    tokenizer, most_tokens = open_tokenizer(meant), resolve_model(meant.model).max_positions
    for task in tasks_of(meant):
        print("\n".join(shown(task, prepared(task, tokenizer, most_tokens, meant.seed), tokenizer)), flush=True)


def tasks_of(config: Config) -> list[EvalTask]:
    """Returns the tasks with the keys of their files. Raises ConfigError."""
    return [read_task(entry, f"eval.tasks.{entry.name or i}") for i, entry in enumerate(config.eval.tasks)]


def prepared(task: EvalTask, tokenizer: Tokenizer, most_tokens: int, seed: int) -> list[Problem]:
    """Returns the problems of a task with their tokens. Raises ValueError with all faults of its rows."""
    problems = read_problems(task, seed)
    encode_problems(task, problems, tokenizer, most_tokens)
    return problems
