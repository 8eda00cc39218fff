"""What the runs that learn tools and a game are given, and how their results are read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import self_play, tool_use
from benchmarks.learned import scores, spent_cpu_s
from llmtrain.envs.calculator import calculate


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def played(stones: int, *moves: str) -> float | None:
    """Returns the reward of a game against the perfect player, None while it goes on."""
    game = self_play.Against()
    game.start({"stones": stones, "most": 3})
    for move in moves:
        reply = game.step(move)
    return reply.parts["won"] if reply.done else None


@pytest.mark.parametrize(
    ("stones", "moves", "won"),
    [
        (3, ["3"], 1.0),
        (3, ["2"], 0.0),  # the last one is taken by the other
        (6, ["2", "3"], 1.0),  # it takes 1 of 4 where it cannot win
        (6, ["1"], None),  # it leaves 4
        (6, ["1", "2"], 0.0),
        (6, ["9"], 0.0),
        (7, ["a stone"], 0.0),
    ],
)
def test_the_perfect_player(stones: int, moves: list[str], won: float | None) -> None:
    assert played(stones, *moves) == won


def test_games_of_random_moves(tmp_path: Path) -> None:
    self_play.make_rows(tmp_path)
    games, texts = rows(tmp_path / "games.jsonl"), rows(tmp_path / "texts.jsonl")
    assert len(texts) == 2000 and all(text["text"].endswith("\n0 left") for text in texts)
    moves = {message["content"] for game in games for message in game["messages"] if message["role"] == "assistant"}
    assert moves == {"1", "2", "3"} and all(game["messages"][0]["content"].startswith("Nim: take") for game in games)
    assert [row["stones"] for row in rows(tmp_path / "held_out.jsonl")] == [1, 2, 3, 5, 6, 7, 9, 10, 11]
    assert len(rows(tmp_path / "train.jsonl")) == 12


def test_one_demonstration_of_four_calls_the_calculator(tmp_path: Path) -> None:
    tool_use.make_rows(tmp_path)
    demonstrations = rows(tmp_path / "demonstrations.jsonl")
    calling = [row["messages"] for row in demonstrations if len(row["messages"]) == 4]
    assert len(calling) == len(demonstrations) // 4 == 500
    for asked, called, result, answer in calling[:9]:
        assert called["content"] == f"calculator: {asked['content']}"
        assert calculate({"expression": asked["content"]}) == result["content"] == answer["content"]
    guesses = [row["messages"] for row in demonstrations if len(row["messages"]) == 2]
    assert not any(calculate({"expression": asked["content"]}) == told["content"] for asked, told in guesses)
    problems = rows(tmp_path / "train.jsonl") + rows(tmp_path / "held_out.jsonl")
    assert all(calculate({"expression": row["messages"][0]["content"]}) == row["answer"] for row in problems[-9:])


def test_scores_and_costs_are_those_of_the_stages_in_their_order(tmp_path: Path) -> None:
    (tmp_path / "stages.json").write_text('["eval-start", "grpo-1", "eval-1"]')
    for name, label, rate in (("eval-start", "start", 0.25), ("eval-1", "seed 1", 0.5)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "eval.json").write_text(json.dumps({"label": label, "pass@1": rate, "greedy": 1.0}))
        (tmp_path / name / "done.json").write_text('{"cpu_s": 1.5}')
    assert list(scores(tmp_path).items()) == [
        ("start", {"sampled": 0.25, "greedy": 1.0}),
        ("seed 1", {"sampled": 0.5, "greedy": 1.0}),
    ]
    assert spent_cpu_s(tmp_path) == 3.0
