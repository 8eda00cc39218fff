"""Provides an environment that says how long the policy's turn was, and generators that say what they are told to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llmtrain.data.chat import Message
from llmtrain.data.tokenizer import Tokenizer
from llmtrain.envs.base import Reply
from llmtrain.types import Group, Prompt, Sample, Sampling


class Counting:
    """Ends when the policy says `end`; each turn is worth its number of characters, and an end 10 more."""

    tools, role, players = (), "user", 1
    closed = 0

    def start(self, example: Mapping[str, Any]) -> list[Message]:
        if example.get("prompt") == "broken":
            raise KeyError("no such thing")
        return [{"role": "user", "content": example["prompt"]}]

    def step(self, text: str) -> Reply:
        if text == "crash":
            raise OSError("the disk is full")
        parts = {"characters": float(len(text)), **({"end": 10.0} if text == "end" else {})}
        heard = [{"role": "user", "content": f"{len(text)} characters"}]
        return Reply([] if text == "end" else heard, parts, done=text == "end")

    def close(self) -> None:
        Counting.closed += 1


class Script:
    """Writes, as the n-th turn of a conversation, what `says(context, n)` returns, and ends it with the token that ends
    a turn; a turn that ends in `...` is cut there. Each token has the log-prob minus its place in the turn."""

    def __init__(self, tokenizer: Tokenizer, says: Callable[[str, int], str], version: int = 3) -> None:
        self.tokenizer, self.says, self.version = tokenizer, says, version
        self.asked: list[tuple[list[Prompt], Sampling]] = []

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        self.asked.append((list(prompts), sampling))
        return [[self._sample(prompt, i) for i in range(sampling.num_samples)] for prompt in prompts]

    def _sample(self, prompt: Prompt, number: int) -> Sample:
        context = self.tokenizer.decode(prompt.ids, skip_special=False)
        text = self.says(context, number)
        cut = text.endswith("...")
        ids = self.tokenizer.encode(text.removesuffix("..."), parse_special=False)
        ids = ids if cut else [*ids, *self.tokenizer.turn_end_ids]
        n = len(ids)
        return Sample(prompt.ids, ids, [True] * n, [-float(i) for i in range(n)], [self.version] * n, not cut)
