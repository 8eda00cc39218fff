"""Shows the prompts of a task as the model gets them, without a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from llmtrain.config.tasks import EvalTask
from llmtrain.data.tokenizer import Tokenizer
from llmtrain.eval.tasks.problems import Problem

SHOWN = 2  # problems of a task


def shown(task: EvalTask, problems: Sequence[Problem], tokenizer: Tokenizer) -> Iterator[str]:
    """Yields the lines that say what a task asks: its facts, and the first problems in full, as their tokens spell
    them, special tokens among them."""
    tokens = [len(problem.ids) for problem in problems]
    how = f"few_shot {task.few_shot}, thinking {task.thinking}, {'chat' if task.chat else 'plain text'}"
    yield f"== {task.label}: {len(problems)} problems, {task.kind}, {how}"
    yield f"   prompts of {min(tokens)} to {max(tokens)} tokens, {sum(tokens) / len(tokens):.1f} in the mean"
    if task.kind == "generate":
        yield f"   completions of at most {task.max_new_tokens} tokens, stop {task.stop}, greedy {task.greedy}, " + (
            f"samples {task.samples}; extract {task.extract}, score {task.score}"
        )
    for number, problem in enumerate(problems[:SHOWN]):
        yield f"-- problem {number} ({problem.where}), {len(problem.ids)} tokens"
        yield problem.text
        for i, hit in enumerate(problem.passages, 1):
            yield f"-- passage {i}, score {hit.score:.4g}: {hit.passage.source}"
        yield from _answers(problem, tokenizer)


def _answers(problem: Problem, tokenizer: Tokenizer) -> Iterator[str]:
    if not problem.options:
        told = problem.gold if problem.gold is not None else problem.values.get("answer", "(by its tests)")
        yield f"-- answer: {told}"
    for i, (_, following) in enumerate(problem.option_ids):
        text = tokenizer.decode(following, skip_special=False)
        yield f"-- option {i}{', right' if i == problem.gold else ''}: {text!r}, {len(following)} tokens"
