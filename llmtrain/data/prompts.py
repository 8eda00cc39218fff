"""Reads the prompts of a file of rows, of every shape that `llmtrain.data.rows` knows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from llmtrain.config.schema import DataConfig
from llmtrain.data.encode import Encoded, encode_rows
from llmtrain.data.faults import Faults
from llmtrain.data.room import Room
from llmtrain.data.sampler import permuted
from llmtrain.data.tokenizer import Tokenizer
from llmtrain.types import Prompt

AS_IT_IS = DataConfig()  # how rows are read where nothing else is said
Starts = Callable[[str, Tokenizer, DataConfig, Faults], Iterator[Encoded]]
"""Yields the rows of a file that can be used, encoded up to the first turn of the policy; the others go to the
faults."""


class PromptSet:
    """Holds the tokenized prompts of a file. `room` says what `max_prompt_tokens` follows from; `starts` reads the file
    where the prompts are those of an environment, which wants the rows themselves with its prompts.

    Raises ValueError with all faults of the file, each with its line.
    """

    def __init__(
        self,
        path: str,
        tokenizer: Tokenizer,
        max_prompt_tokens: int,
        settings: DataConfig = AS_IT_IS,
        room: str | None = None,
        starts: Starts | None = None,
    ) -> None:
        faults = Faults(path)
        words = f"the {max_prompt_tokens} there is room for" + (f" ({room})" if room else "")
        limit = Room(max_prompt_tokens, words, settings.overlong, faults)
        read = partial(encode_rows, answered=False) if starts is None else starts
        rows = [limit.prompt(row) for row in read(path, tokenizer, settings, faults)]
        kept = [row for row in rows if row is not None]
        faults.raise_any()
        limit.report(path, len(kept))
        self.examples = [row.example.record for row in kept]
        self.parsed = [row.example for row in kept]  # of which `examples` are the records
        self.places = [row.where for row in kept]  # file:line of each
        self.ids = [row.ids for row in kept]
        self.with_examples = starts is not None

    def __len__(self) -> int:
        return len(self.examples)

    def prompt_ids(self, i: int) -> list[int]:
        """Returns the token ids of the i-th prompt."""
        return self.ids[i]

    def prompt(self, i: int, seed: int) -> Prompt:
        """Returns what a generator is asked to continue: the i-th prompt, with a random stream."""
        return Prompt(self.ids[i], seed, self.examples[i] if self.with_examples else {})

    def at(self, global_index: int, seed: int) -> int:
        """Returns which example the run's `global_index`-th prompt is: each once an epoch, in a new order each time."""
        return permuted(global_index, len(self), seed)

    def around(self, number: int, seed: int) -> int:
        """Returns which example stands at a number in one order that begins again behind its end, so that no example
        comes twice in `len` numbers in a row, wherever they begin."""
        return self.at(number % len(self), seed)
