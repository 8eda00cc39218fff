"""Implements Nim with one heap, which a policy plays against itself: both sides take stones in turn, and whoever takes
the last one wins."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from llmtrain.data.chat import Message
from llmtrain.envs.base import Reply

MOST_STONES = 1000
MOVE = re.compile(r"\d{1,4}(?!\d)")
WON = "won"  # the part: 1 for who wins, -1 for who loses
MISSED = "missed"  # the part of `note_moves`


class Nim:
    """Holds a game. A row says how it starts: `stones`, and `most` that may be taken at once (by default 3).

    A move is the first number of a turn; without one, or with one that is not allowed, the game is lost. Who can leave
    a multiple of `most` + 1 stones wins by doing so each time.
    """

    tools: tuple[()] = ()
    role = "user"
    players = 2

    def __init__(self, note_moves: bool = False) -> None:
        """Makes a game. With `note_moves` it gives a part `missed`: -1 for every move that gave a won game away."""
        self.note_moves = note_moves
        self.stones, self.most, self.player = 0, 0, 0
        self.spoken: set[int] = set()

    def start(self, example: Mapping[str, Any]) -> list[Message]:
        """Returns what the first player is told. Raises ValueError for a row that is no game."""
        self.stones, self.most = (whole(example, "stones", None), whole(example, "most", 3))
        return [self.told(0)]

    def told(self, player: int) -> Message:
        """Returns what a player hears before a move: the rules at first, and the stones that are left."""
        rules = "" if player in self.spoken else f"Nim: take 1 to {self.most}, the last stone wins. "
        self.spoken.add(player)
        return {"role": "user", "content": f"{rules}{self.stones} left"}

    def step(self, text: str) -> Reply:
        """Returns the answer to a move: the other player's next message, or the end of the game."""
        found = MOVE.search(text)
        taken = int(found[0]) if found else 0
        if not 1 <= taken <= min(self.most, self.stones):
            return self.ended(won=False, parts=self.missed(0))
        parts = self.missed(taken)
        self.stones -= taken
        if self.stones == 0:
            return self.ended(won=True, parts=parts)
        self.player = 1 - self.player
        return Reply([self.told(self.player)], parts, player=self.player)

    def missed(self, taken: int) -> dict[str, float]:
        """Returns the part of a move: -1 where another one would have won."""
        wins = self.stones % (self.most + 1)
        return {MISSED: -float(0 < wins != taken)} if self.note_moves else {}

    def ended(self, won: bool, parts: dict[str, float]) -> Reply:
        """Returns the end of the game, as seen by who moved last."""
        value = 1.0 if won else -1.0
        return Reply(done=True, parts={WON: value, **parts}, parts_of={1 - self.player: {WON: -value}})

    def close(self) -> None:
        """Has nothing to end."""


def whole(example: Mapping[str, Any], name: str, default: int | None) -> int:
    """Returns a number of stones of a row. Raises ValueError where it is none."""
    value = example.get(name, default)
    if type(value) is not int or not 1 <= value <= MOST_STONES:
        raise ValueError(f"field {name!r} is {value!r:.40}, and must be a whole number of 1 to {MOST_STONES}; mend it")
    return value
