"""Offers search over a store of `llmtrain index` as a tool."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmtrain.config.retrieval import StoreConfig
from llmtrain.data.search.store import Hit, Store, open_store
from llmtrain.envs.toolbox import Tool
from llmtrain.parallel.device import rank_device

MOST_CHARACTERS = 1000  # of a question that is searched for


def search_tool(settings: StoreConfig) -> Tool:
    """Returns the tool; the store is opened now. Raises ValueError as `open_store` does."""
    store = open_store(settings.store, settings.mode, str(rank_device()))
    return Tool(
        "search",
        "Finds passages in a library of documents.",
        {"query": {"type": "string", "description": "words or a question"}},
        lambda arguments: found(store, settings.k, arguments),
    )


def found(store: Store, k: int, arguments: Mapping[str, Any]) -> str:
    """Returns what a policy reads: the best passages for a question, numbered, the best first."""
    hits = store.search(arguments["query"][:MOST_CHARACTERS], k)
    return "\n\n".join(shown(number, hit) for number, hit in enumerate(hits, 1)) or "nothing was found; try other words"


def shown(number: int, hit: Hit) -> str:
    """Returns a passage below its number and the name of its document."""
    return f"[{number}] {hit.passage.url or hit.passage.document}\n{hit.passage.text}"
