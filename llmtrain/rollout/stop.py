"""Decides where a sequence ends: at a stop token, or where its text holds a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Decode = Callable[[Sequence[int]], str]
"""Returns the text of tokens, special ones among them."""

CUT = "\ufffd"  # stands for bytes that are no character; one that is cut may spoil all bytes that follow
EDGE = 4  # characters at the start of decoded text that its cut may spoil: a part of one, a space that is dropped


@dataclass(frozen=True)
class Stop:
    """Tells whether the last token of a completion ends it.

    Example: Stop((1,), ("\\n\\nQ:",), tokenizer.decode)([5, 9, 1]) is True
    """

    ids: tuple[int, ...]
    strings: tuple[str, ...] = ()
    decode: Decode | None = None  # needed where there are strings

    def __call__(self, tokens: Sequence[int]) -> bool:
        """Returns whether `tokens`, a completion that did not end before its last token, ends with it."""
        if tokens[-1] in self.ids:
            return True
        text = self._tail(tokens) if self.strings else ""
        return any(string in text for string in self.strings)

    def _tail(self, tokens: Sequence[int]) -> str:
        """Returns the end of the text, in which every stop string that the last token completes lies whole."""
        assert self.decode is not None
        needed = EDGE + max(map(len, self.strings))
        count = needed + 1
        while count < len(tokens):
            text = self.decode(tokens[-count:-1])
            if len(text) >= needed and CUT not in text[:EDGE]:
                return self.decode(tokens[-count:])[EDGE:]
            count *= 2
        return self.decode(tokens)
