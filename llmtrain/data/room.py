"""Decides what becomes of rows that are longer than there is room for (`data.overlong`), and counts them."""

from __future__ import annotations

from dataclasses import replace

from llmtrain.data.encode import Encoded
from llmtrain.data.faults import Faults
from llmtrain.observe.log import log
from llmtrain.types import Group


class Room:
    """Holds how many tokens of a row there is room for. `words` says what that follows from, for messages."""

    def __init__(self, tokens: int, words: str, overlong: str, faults: Faults) -> None:
        self.tokens, self.words, self.overlong, self.faults = tokens, words, overlong, faults
        self.dropped = self.cut = 0

    def demonstration(self, row: Encoded) -> Encoded | None:
        """Returns the row, cut at its end if it is too long, or None when it is left out or nothing of it is trained.

        The last token is predicted but no input, so that a row may have one more than there is room for.
        """
        if len(row.ids) - 1 <= self.tokens:
            return self._trained(row)
        if self.overlong == "error":
            self._refuse(row.where, "example", len(row.ids) - 1)
        if self.overlong != "truncate" or not any(row.trained[1 : self.tokens + 1]):
            self.dropped += self.overlong != "error"
            return None
        self.cut += 1
        return row._replace(ids=row.ids[: self.tokens + 1], trained=row.trained[: self.tokens + 1])

    def prompt(self, row: Encoded) -> Encoded | None:
        """Returns the row, cut at its beginning (but for BOS) if it is too long, or None when it is left out."""
        if not row.ids:
            return self.faults.add(row.where, "the prompt is empty; write one or remove the row")
        if len(row.ids) <= self.tokens:
            return row
        if self.overlong == "error":
            return self._refuse(row.where, "prompt", len(row.ids))
        if self.overlong == "drop" or row.bos >= self.tokens:
            self.dropped += 1
            return None
        self.cut += 1
        return row._replace(ids=row.ids[: row.bos] + row.ids[row.bos - self.tokens :])

    def pair(self, where: str, pair: Group, tokens: int, bos: int) -> Group | None:
        """Returns two samples of a prompt that take `tokens` of one row, their prompt cut at its beginning (but for its
        first `bos` tokens) if that is too long, or None when they are left out."""
        prompt, over = pair[0].prompt_ids, tokens - self.tokens
        if over <= 0:
            return pair
        if self.overlong == "error":
            return self._refuse(where, "pair (its prompt once, and both answers)", tokens)
        if self.overlong == "drop" or len(prompt) - bos <= over:
            self.dropped += 1
            return None
        self.cut += 1
        return [replace(sample, prompt_ids=prompt[:bos] + prompt[bos + over :]) for sample in pair]

    def _trained(self, row: Encoded) -> Encoded | None:
        if any(row.trained[1:]):
            return row
        return self.faults.add(row.where, "no token of this row follows another, so nothing is trained; remove it")

    def _refuse(self, where: str, what: str, tokens: int) -> None:
        self.faults.add(
            where,
            f"the {what} has {tokens} tokens, more than {self.words}; make room, shorten it, or set data.overlong to "
            "drop or truncate",
        )

    def report(self, path: str, kept: int) -> None:
        """Logs how many rows were left out or cut. Raises ValueError when none is left."""
        if self.dropped or self.cut:
            log(
                f"{path}: of {kept + self.dropped} rows {self.dropped} were left out and {self.cut} cut, "
                f"longer than {self.words} (data.overlong={self.overlong})"
            )
        if not kept:
            raise ValueError(f"{path}: every row is longer than {self.words}; make room, or give shorter rows")
