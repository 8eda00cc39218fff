from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from llmtrain.config.testtime import TestTimeConfig
from llmtrain.eval.testtime.problems import Graded, Problems, Spoken, Written, by_logprob, by_step, weight_of
from llmtrain.eval.testtime.run import measured
from llmtrain.rewards import Score
from llmtrain.types import Prompt, Sampling
from tests.eval.testtime.scripted import STOP, Scripted, decode, encode

GOLD = ["7", "5"]


def answer_of(text: str) -> str | None:
    """The last digit is the answer."""
    return next((c for c in reversed(text) if c.isdigit()), None)


def problems() -> Problems:
    return Problems(
        [Prompt(encode("p"), 1), Prompt(encode("q"), 2)],
        [{}, {}],
        decode,
        judge=lambda pairs: [Score(1.0 if answer_of(text) == GOLD[i] else 0.4) for i, text in pairs],
        classes=lambda texts: [None if (a := answer_of(text)) is None else int(a) for text in texts],
    )


def model(script: dict[str, list[str]]) -> Spoken:
    return Spoken(Scripted(script), Sampling(9, stop_ids=(STOP,)), encode, decode, room_tokens=40)


def longest(written: Sequence[Written]) -> list[float | None]:
    return [float(len(each.ids)) for each in written]


def test_votes_and_best_of_the_same_samples() -> None:
    # p: 7, 7, 3, none; q: 1, 1, 1, 5, the longest
    spoken = model({"p": ["7$", "7$", "3$", "x$"], "q": ["1$", "1$", "1$", "555$"]})
    settings = TestTimeConfig(samples=4, scores=["length"])
    lines = measured(settings, 0, spoken, problems(), {"length": Graded(longest, "reward")}, None)
    assert list(lines) == ["majority", "weighted majority by length", "best of n by length"]
    majority, weighted, best = lines.values()
    assert [point["n"] for point in majority] == [1, 2, 4]
    assert [point["tokens"] for point in majority] == [(2 + 10 / 4) / 2, 2 + 10 / 4, 4 + 10 / 2]
    # p as in vote_test: 1/2, 4/6, 1; q: 1/4, pairs 1-5 tie: 3/6 of which half, 0
    assert [point["accuracy"] for point in majority] == pytest.approx([(1 / 2 + 1 / 4) / 2, (4 / 6 + 1 / 4) / 2, 1 / 2])
    # q: 4 against 2: of two samples 5 wins whenever it is there, of four 2 + 2 + 2 against 4
    assert [point["accuracy"] for point in weighted] == pytest.approx([(1 / 2 + 1 / 4) / 2, (4 / 6 + 1 / 2) / 2, 1 / 2])
    assert [point["subset_error"] for point in weighted] == [0, 0, 0]
    # p: all tie, two of four are right; q: the longest is right
    assert [point["accuracy"] for point in best] == pytest.approx([(1 / 2 + 1 / 4) / 2, (1 / 2 + 1 / 2) / 2, 3 / 4])
    assert majority[2]["interval"] == [0.0, 1.0]


def test_budgets_and_search_are_lines_too() -> None:
    script = {"p": ["12345$", "7$"], "q": ["12345$", "5$"], "p12=": ["7$"], "q12=": ["6$"]}
    script |= {"p1": ["7$"], "q1": ["5$"]}
    settings = TestTimeConfig(
        methods=["budget", "search"],
        budget={"budgets": [2], "end": None, "close": "=", "answer_tokens": 2},
        search={"candidates": [2], "width": 2, "stop": ",", "step_tokens": 9, "score": "length"},
    )
    lines = measured(settings, 0, model(script), problems(), {}, Graded(longest, "reward"))
    (limit,), (search,) = lines["length limit"], lines["search by length"]
    assert (limit["accuracy"], limit["tokens"], limit["cut"]) == (0.5, 5, 1)
    # the longer one, 12345, outweighs the right one
    assert (search["accuracy"], search["tokens"], search["steps"]) == (pytest.approx(1 / 2), 8, 1)


def test_a_budget_without_room_is_refused_before_anything_is_sampled() -> None:
    spoken = model({})
    settings = TestTimeConfig(methods=["majority", "budget"], budget={"budgets": [30], "answer_tokens": 4})
    with pytest.raises(
        ValueError, match=r"budgets=30: with the longest prompt \(1 tokens\), close \(22\) .* 57 tokens"
    ):
        measured(settings, 0, spoken, problems(), {}, None)
    assert spoken.generator.calls == []


def test_a_search_without_room_is_refused_before_anything_is_sampled() -> None:
    spoken = model({})._replace(room_tokens=9)
    settings = TestTimeConfig(methods=["majority", "search"])
    with pytest.raises(ValueError, match=r"max_new_tokens=9: with the longest prompt \(1 tokens\) a row has 10 tokens"):
        measured(settings, 0, spoken, problems(), {}, Graded(longest, "reward"))
    assert spoken.generator.calls == []


def test_scores_and_weights() -> None:
    assert by_logprob([Written(0, [1, 2], [-1.0, -2.0]), Written(0)]) == [-1.5, None]
    assert weight_of(-1.5, "logprob") == pytest.approx(math.exp(-1.5))
    assert [weight_of(x, "model") for x in (0.0, -1e9)] == [0.5, 0.0]
    assert weight_of(2.0, "model") == pytest.approx(0.8808, abs=1e-4)  # 1 / (1 + e^-2)
    assert [weight_of(x, "reward") for x in (0.3, -1.0, None)] == [0.3, 0.0, 0.0]


def test_a_process_reward_reads_the_ids_as_they_were_written() -> None:
    asked: list[list[int]] = []

    def scores(rows: Sequence[list[int]]) -> list[float]:
        asked.extend(rows)
        return [float("nan") if row[-1] == 9 else 0.5 for row in rows]

    prompts = [Prompt([4, 5]), Prompt([6])]
    grade = by_step(scores, 4, Problems(prompts, [{}, {}], decode, lambda p: [], lambda t: []))
    assert grade([Written(0, [7]), Written(1, [1, 2, 3, 8]), Written(1, [9])]) == [0.5, None, None]
    assert asked == [[4, 5, 7], [6, 9]]
