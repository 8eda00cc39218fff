from __future__ import annotations

from llmtrain.eval.tasks.options import likeliest, measure_options
from llmtrain.eval.tasks.problems import Problem


def problem(options: list[str], tokens: list[int], gold: int) -> Problem:
    return Problem("a:1", {}, "q", gold, options, [1], "q", [([1], [2] * n) for n in tokens])


def test_accuracies_by_hand() -> None:
    # sums -2, -3, -5.5; by tokens (1, 2, 4): -2, -1.5, -1.375; by bytes (2, 4, 3): -1, -0.75, -1.83
    first = problem([" ab", " abcd", " é1"], [1, 2, 4], 2)
    # sums -2.1, -4, by tokens the same, by bytes (1, 2; the space is none of them): -2.1, -2
    second = problem([" a", " bb"], [1, 1], 0)
    scores, records = measure_options([first, second], [[-2.0, -3.0, -5.5], [-2.1, -4.0]])
    assert {name: scores[name] for name in ("acc", "acc_tokens", "acc_bytes")} == {
        "acc": 0.5,
        "acc_tokens": 1.0,
        "acc_bytes": 0.0,
    }
    assert scores["problems"] == 2 and scores["interval"]["acc"] == [0.0, 1.0]
    assert scores["interval"]["acc_tokens"] == [1.0, 1.0]
    assert records[0] == {
        **{"problem": 0, "prompt": "q", "completion": " ab", "reward": 0.0},
        **{"logprobs": [-2.0, -3.0, -5.5], "right": 2},
    }


def test_ties_go_to_the_first() -> None:
    assert likeliest([-2.0000005, -2.0], [1, 1], [1, 1]) == 0
    assert likeliest([-2.000002, -2.0], [1, 1], [1, 1]) == 1
    assert likeliest([-2.000002, -2.0], [3, 3], [1, 1]) == 0  # 1e-6 nats a token
    assert likeliest([-3.0, -2.0, -2.0], [1, 1, 1], [1, 1, 1]) == 1


def test_an_option_with_the_text_of_the_right_one_is_right() -> None:
    scores, records = measure_options([problem([" x", " x", " y"], [1, 1, 1], 1)], [[-1.0, -1.0, -2.0]])
    assert scores["acc"] == 1.0 and records[0]["right"] == 1
