"""Reads the prompts of a file of rows, of every shape that `llmtrain.data.rows` knows."""

from __future__ import annotations

from llmtrain.config.schema import DataConfig
from llmtrain.data.encode import encode_rows
from llmtrain.data.faults import Faults
from llmtrain.data.room import Room
from llmtrain.data.sampler import permuted
from llmtrain.data.tokenizer import Tokenizer

AS_IT_IS = DataConfig()  # how rows are read where nothing else is said


class PromptSet:
    """Holds the tokenized prompts of a file. `room` says what `max_prompt_tokens` follows from.

    Raises ValueError with all faults of the file, each with its line.
    """

    def __init__(
        self,
        path: str,
        tokenizer: Tokenizer,
        max_prompt_tokens: int,
        settings: DataConfig = AS_IT_IS,
        room: str | None = None,
    ) -> None:
        faults = Faults(path)
        words = f"the {max_prompt_tokens} there is room for" + (f" ({room})" if room else "")
        limit = Room(max_prompt_tokens, words, settings.overlong, faults)
        rows = [limit.prompt(row) for row in encode_rows(path, tokenizer, settings, faults, answered=False)]
        kept = [row for row in rows if row is not None]
        faults.raise_any()
        limit.report(path, len(kept))
        self.examples = [row.example.record for row in kept]
        self.parsed = [row.example for row in kept]  # of which `examples` are the records
        self.places = [row.where for row in kept]  # file:line of each
        self.ids = [row.ids for row in kept]

    def __len__(self) -> int:
        return len(self.examples)

    def prompt_ids(self, i: int) -> list[int]:
        """Returns the token ids of the i-th prompt."""
        return self.ids[i]

    def at(self, global_index: int, seed: int) -> int:
        """Returns which example the run's `global_index`-th prompt is: each once an epoch, in a new order each time."""
        return permuted(global_index, len(self), seed)

    def around(self, number: int, seed: int) -> int:
        """Returns which example stands at a number in one order that begins again behind its end, so that no example
        comes twice in `len` numbers in a row, wherever they begin."""
        return self.at(number % len(self), seed)
