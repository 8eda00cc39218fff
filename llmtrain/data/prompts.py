"""Reads prompts from a JSONL file: `prompt`, or `messages` for the chat template, and an optional `prefill`."""

from __future__ import annotations

from typing import Any

from llmtrain.data.jsonl import read_jsonl, text_field
from llmtrain.data.sampler import permuted
from llmtrain.data.tokenizer import Tokenizer


def encode_prompt(record: dict[str, Any], tokenizer: Tokenizer, where: str) -> list[int]:
    """Returns the token ids of a record's prompt. Raises ValueError, with `where`, when there is none."""
    prefill = text_field(record, ("prefill",), where) if "prefill" in record else ""
    if "messages" in record:
        ids = tokenizer.encode(tokenizer.render(record["messages"], prefill))
    else:
        ids = tokenizer.encode(text_field(record, ("prompt", "messages"), where) + prefill, parse_special=False)
    if not ids:
        raise ValueError(f"{where}: the prompt is empty")
    return ids


class PromptSet:
    """Holds the tokenized prompts of a file. Raises ValueError, with file and line, for a broken or too long one."""

    def __init__(self, path: str, tokenizer: Tokenizer, max_prompt_tokens: int) -> None:
        lines = read_jsonl(path)
        self.examples = [record for _, record in lines]
        self.places = [f"{path}:{n}" for n, _ in lines]
        self.ids = [encode_prompt(record, tokenizer, f"{path}:{n}") for n, record in lines]
        for (n, _), ids in zip(lines, self.ids, strict=True):
            if len(ids) > max_prompt_tokens:
                raise ValueError(
                    f"{path}:{n}: the prompt has {len(ids)} tokens, more than the {max_prompt_tokens} there is room "
                    "for; shorten or drop it"
                )

    def __len__(self) -> int:
        return len(self.examples)

    def prompt_ids(self, i: int) -> list[int]:
        """Returns the token ids of the i-th prompt."""
        return self.ids[i]

    def at(self, global_index: int, seed: int) -> int:
        """Returns which example the run's `global_index`-th prompt is: each once an epoch, in a new order each time."""
        return permuted(global_index, len(self), seed)
