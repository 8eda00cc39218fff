"""Nim against oneself: moves by hand, who is told what, and the rows of both sides."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from llmtrain.config.environment import EnvironmentConfig
from llmtrain.data.groups import group_length
from llmtrain.data.tree import Tree
from llmtrain.envs.build import environment_maker
from llmtrain.envs.dialogue import Renderer
from llmtrain.envs.episodes import Episodes
from llmtrain.envs.nim import Nim
from llmtrain.types import Group, Prompt, Sampling
from tests.data.families import family
from tests.envs.talk import Script

RULES = "Nim: take 1 to 3, the last stone wins. "


def test_a_game() -> None:
    game = Nim(note_moves=True)
    assert game.start({"stones": 6}) == [{"role": "user", "content": RULES + "6 left"}]
    first = game.step("I take 2.")  # leaves 4: the right move
    assert (first.player, first.done, first.parts) == (1, False, {"missed": 0.0})
    assert first.messages == [{"role": "user", "content": RULES + "4 left"}]
    second = game.step("3")  # all moves lose
    assert (second.player, second.parts) == (0, {"missed": 0.0})
    assert second.messages == [{"role": "user", "content": "1 left"}]
    end = game.step("1")
    assert end.done and end.parts == {"won": 1.0, "missed": 0.0} and end.parts_of == {1: {"won": -1.0}}


@pytest.mark.parametrize("text", ["", "none", "0", "4", "-", "99999", "12345678901234567890"])
def test_a_move_that_is_none_loses(text: str) -> None:
    game = Nim()
    game.start({"stones": 9})
    game.step("1")
    end = game.step(text)
    assert end.done and end.parts == {"won": -1.0} and end.parts_of == {0: {"won": 1.0}}


def test_more_than_there_are_is_no_move() -> None:
    game = Nim(note_moves=True)
    game.start({"stones": 2, "most": 5})
    assert game.step("3").parts == {"won": -1.0, "missed": -1.0}  # 2 would have won


@pytest.mark.parametrize("row", [{}, {"stones": 0}, {"stones": "6"}, {"stones": True}, {"stones": 6, "most": 1001}])
def test_a_row_that_is_no_game_is_refused(row: dict) -> None:
    with pytest.raises(ValueError, match="and must be a whole number of 1 to 1000; mend it"):
        Nim().start(row)


def played(folder: Path, moves: dict[str, str], stones: int, samples: int) -> tuple[Group, list[str]]:
    """Returns the group of games in which what is left decides the move, and the text of each row."""
    tokenizer = family("qwen", folder)
    settings = EnvironmentConfig(game="nim", max_turns=20)
    make = environment_maker(settings)

    def says(context: str, number: int) -> str:
        left = context.rpartition(" left")[0].rpartition("user\n")[2].removeprefix(RULES)
        return moves[left] if number == 0 else "no"

    episodes = Episodes(Script(tokenizer, says), Renderer(tokenizer), make, settings, 500, tokenizer.decode)
    row = {"stones": stones}
    prompt = Prompt(tokenizer.encode_chat(make().start(row)), 1, row)
    (group,) = episodes.generate([prompt], Sampling(max_new_tokens=10, num_samples=samples))
    return group, [tokenizer.decode(s.prompt_ids + s.ids, skip_special=False) for s in group]


def test_both_sides_have_rows_that_share_a_prompt(tmp_path: Path) -> None:
    """Game 0: 6 -> 4 -> 1 -> 0, the first wins; game 1: the first says no at once, and the second never spoke."""
    group, texts = played(tmp_path, {"6": "2", "4": "3", "1": "1"}, 6, samples=2)
    assert [s.parts["won"] for s in group] == [1.0, -1.0, -1.0, 1.0]
    end, start = "<|im_end|>\n<|im_start|>", "<|im_start|>user\n" + RULES
    turn = f"{end}assistant\n"
    assert texts[0] == f"{start}6 left{turn}2{end}user\n1 left{turn}1<|im_end|>"
    assert texts[1] == f"{start}4 left{turn}3<|im_end|>"
    assert texts[2] == f"{start}6 left{turn}no<|im_end|>"
    assert [sum(s.trained) for s in group] == [4, 2, 3, 0] and all(s.finished for s in group)
    shared = group[0].prompt_ids
    assert all(s.prompt_ids == shared and s.ids and not s.trained[0] for s in group) and len(shared) > 10
    assert sum(s.reward for s in group) == 0


def test_what_the_rows_of_a_group_share_is_computed_once(tmp_path: Path) -> None:
    """Eight games of 21 stones: both sides are told the rules, and many games begin alike. These are the numbers of
    docs/batches.md."""
    tokenizer, rng = family("qwen", tmp_path), random.Random(0)
    settings = EnvironmentConfig(game="nim", max_turns=20)
    make = environment_maker(settings)
    script = Script(tokenizer, lambda context, number: str(rng.randint(1, 2)))
    episodes = Episodes(script, Renderer(tokenizer), make, settings, 500, tokenizer.decode)
    row = {"stones": 21}
    prompt = Prompt(tokenizer.encode_chat(make().start(row)), 1, row)
    (group,) = episodes.generate([prompt], Sampling(max_new_tokens=10, num_samples=8))
    alone = sum(len(s.prompt_ids) - 1 + len(s.ids) for s in group)
    prompts, tree = group_length(group), Tree(group).tokens
    assert (len(group), alone, prompts, tree) == (16, 2830, 2260, 1824)


def test_arguments_that_it_does_not_take_are_refused() -> None:
    with pytest.raises(ValueError, match=r"game=nim: cannot be made: TypeError.*; mend it, or its args"):
        environment_maker(EnvironmentConfig(game="nim", args={"heaps": 3}))
    assert environment_maker(EnvironmentConfig(game="nim", args={"note_moves": True}))().note_moves
