"""Finds passages of a user's documents for the problems of a task, which stand in its prompts (`context` of a task)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llmtrain.config.tasks import EvalTask
from llmtrain.data.search.store import Hit, open_store

Find = Callable[[str], list[Hit]]
"""Finds passages for a question, the best first."""


def finder_of(task: EvalTask) -> Find | None:
    """Returns what searches the store of a task, None where it names none. Raises ValueError as `open_store` does."""
    if task.context is None:
        return None
    store, k = open_store(task.context.store, task.context.mode), task.context.k
    return lambda question: store.search(question, k)


def passages_text(hits: Sequence[Hit]) -> str:
    """Returns what {{passages}} stands for: the texts, the best first, with a blank line between them."""
    return "\n\n".join(hit.passage.text for hit in hits)


def told(hits: Sequence[Hit]) -> list[Mapping[str, Any]]:
    """Returns what samples.jsonl says of the passages in a prompt."""
    return [{"source": hit.passage.source, "score": hit.score} for hit in hits]
