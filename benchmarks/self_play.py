"""Trains a tiny model to play Nim against itself (`configs/grpo/nim.yaml`), from nothing, by three seeds.

    python -m benchmarks.self_play [--out benchmarks/results/self_play.json]

The rows are made here: games of random moves, from which the model learns the form of a move, and the heaps from which
games start. Before and after, the policy plays against a perfect player from every heap that a first player can win:
it wins only if each of its moves is right.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.learned import Row, report, write_rows
from llmtrain.data.chat import Message
from llmtrain.envs.base import Reply
from llmtrain.envs.nim import Nim

CONFIG = "configs/grpo/nim.yaml"
ROWS, RUN = Path("runs/nim-rows"), Path("runs/nim")
STONES, MOST, GAMES = 12, 3, 2000
WON = [stones for stones in range(1, STONES + 1) if stones % (MOST + 1)]  # heaps that the first player can win


class Against:
    """Holds a game of Nim of a policy, who begins, against a perfect player. The part `won` is 1 or 0."""

    tools, role, players = (), "user", 1

    def __init__(self) -> None:
        """Makes a game."""
        self.game = Nim()

    def start(self, example: Mapping[str, Any]) -> list[Message]:
        """Returns what the policy is told first."""
        return self.game.start(example)

    def step(self, text: str) -> Reply:
        """Returns what the policy is told after the perfect player's move."""
        mine = self.game.step(text)
        if mine.done:
            return Reply(done=True, parts={"won": float(mine.parts["won"] > 0)})
        theirs = self.game.step(str(self.game.stones % (MOST + 1) or 1))
        return Reply(done=True, parts={"won": 0.0}) if theirs.done else theirs

    def close(self) -> None:
        """Has nothing to end."""


def random_game(stream: random.Random) -> tuple[str, list[Row]]:
    """Returns a game of random moves: as a text, and as the conversation of each side that moved."""
    game, sides = Nim(), {0: [], 1: []}
    player, heard = 0, game.start({"stones": stream.randint(1, STONES), "most": MOST})
    said = [heard[0]["content"]]
    while True:
        move = str(stream.randint(1, min(MOST, game.stones)))
        sides[player] += [*heard, {"role": "assistant", "content": move}]
        reply = game.step(move)
        said += [move, f"{game.stones} left"]
        if reply.done:
            return "\n".join(said), [{"messages": messages} for messages in sides.values() if messages]
        player, heard = reply.player, reply.messages


def make_rows(folder: Path) -> None:
    """Writes the files of rows, the same ones each time."""
    stream = random.Random(0)
    played = [random_game(stream) for _ in range(GAMES)]
    starts = [{"stones": stones, "most": MOST} for stones in range(1, STONES + 1)]
    games = [row for _, rows in played for row in rows]
    rows = {"texts": [{"text": text} for text, _ in played], "games": games, "train": starts}
    write_rows(folder, {**rows, "held_out": [start for start in starts if start["stones"] in WON]})


if __name__ == "__main__":
    report(__doc__, "benchmarks.self_play", CONFIG, ROWS, RUN, make_rows)
