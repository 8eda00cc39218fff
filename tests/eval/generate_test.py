from __future__ import annotations

from collections.abc import Sequence

import pytest

from llmtrain.eval.generate import evaluate_problems
from llmtrain.rewards import Score
from llmtrain.types import Group, Prompt, Sample, Sampling

SAMPLED = [[7, 7, 8, 7], [5, 6, 6, 9], [1, 2, 3, 4]]  # answers of four samples to three problems
GREEDY = [7, 6, 1]
GOLD = [7, 5, 9]


class Scripted:
    """Completes prompt [100 + i] by the scripted answers."""

    def __init__(self) -> None:
        self.requests: list[Sampling] = []

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        self.requests.append(sampling)
        answers = [[a] for a in GREEDY] if sampling.temperature == 0 else SAMPLED
        return [
            [Sample(p.ids, [a], [True], [-a / 8], [0], finished=True) for a in own]
            for p, own in zip(prompts, answers, strict=False)
        ]


def judged(i: int, text: str) -> Score:
    if text == "8":
        return Score(0.0, "took longer than 5 s")
    return Score(1.0 if int(text) == GOLD[i] else 0.1)  # partial credit is not a solution


def _evaluate(generator: Scripted, prompts: list[Prompt], **keys: object) -> tuple[dict, list[dict]]:
    given = {
        "decode": lambda ids: " ".join(map(str, ids)),
        "judge": lambda pairs: [judged(i, text) for i, text in pairs],
        "classes": lambda texts: [None if text == "9" else int(text) for text in texts],
        "samples": 4,
        "sampling": Sampling(max_new_tokens=3, num_samples=99, temperature=0.7, stop_ids=(2,)),
    }
    return evaluate_problems(generator, prompts, **{**given, **keys})


def test_scores_by_hand() -> None:
    # right samples 3, 1, 0 of 4: pass@1 = avg@4 = (3/4 + 1/4 + 0) / 3; two problems have one: pass@4 = 2/3;
    # pass@2 = (1 + (1 - 3/6) + 0) / 3 = 1/2; 15 completions of one token, none cut off;
    # entropy (29 + 26 + 10) / 12 tokens / 8, of the sampled ones alone;
    # majorities 7 (gold), 6 (gold 5), 1 (gold 9): 1/3; greedy 7, 6, 1: 1/3
    generator = Scripted()
    scores, records = _evaluate(generator, [Prompt([100 + i], seed=i) for i in range(3)])
    interval = scores.pop("interval")
    assert scores == pytest.approx(
        {"pass@1": 1 / 3, "pass@2": 1 / 2, "pass@4": 2 / 3, "avg@4": 1 / 3, "maj@4": 1 / 3, "greedy": 1 / 3}
        | {"entropy": 65 / 12 / 8, "tokens": 1, "cut_off": 0, "problems": 3, "reward_errors": 1}
    )
    assert interval.keys() == {"pass@1", "pass@2", "pass@4", "avg@4", "maj@4", "greedy"}
    # of 3 problems a resample has none, or all, of the one right by chance 8/27 and 1/27, more than 2.5 %
    assert interval["greedy"] == interval["maj@4"] == [0.0, 1.0] and interval["pass@1"] == [0.0, 0.75]
    assert [(r.temperature, r.num_samples, r.stop_ids) for r in generator.requests] == [(0.0, 1, (2,)), (0.7, 4, (2,))]
    assert [r["greedy"] for r in records] == [True] * 3 + [False] * 12
    assert records[1] == {"problem": 1, "prompt": "101", "completion": "6", "reward": 0.1, "greedy": True}
    assert records[3 + 4]["completion"] == "5" and records[3 + 4]["reward"] == 1.0


def test_greedy_alone_and_samples_alone() -> None:
    prompts = [Prompt([100 + i], seed=i) for i in range(3)]
    generator = Scripted()
    scores, records = _evaluate(generator, prompts, samples=0)
    assert len(generator.requests) == 1 and [r["completion"] for r in records] == ["7", "6", "1"]
    assert scores["greedy"] == pytest.approx(1 / 3) and not {"pass@1", "avg@0", "maj@0"} & scores.keys()
    assert scores["entropy"] == pytest.approx(14 / 3 / 8)
    scores, records = _evaluate(Scripted(), prompts, greedy=False, classes=None)
    assert "greedy" not in scores and "maj@4" not in scores and len(records) == 12 and scores["pass@4"] > 0


def test_an_environment_scores_its_episodes() -> None:
    def by_episode(samples: Sequence[Sample], judged: Sequence[Score] | None) -> list[Score]:
        assert judged is None
        return [Score(float(sample.ids == [7])) for sample in samples]

    prompts = [Prompt([100 + i], seed=i) for i in range(3)]
    scores, records = _evaluate(Scripted(), prompts, judge=None, classes=None, by_episode=by_episode)
    assert scores["greedy"] == pytest.approx(1 / 3) and scores["pass@1"] == pytest.approx((3 / 4 + 0 + 0) / 3)
    assert [r["reward"] for r in records[:3]] == [1.0, 0.0, 0.0] and "maj@4" not in scores


def test_rows_of_an_episode_are_one_answer() -> None:
    """The second answer to each problem was given in two rows: its last one is judged, both are told and counted."""

    class Rows:
        def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
            def row(attempt: int, ids: list[int], finished: bool = True) -> Sample:
                trained = [False, *[True] * (len(ids) - 1)]
                return Sample([100], ids, trained, [-0.5] * len(ids), [0] * len(ids), finished, attempt=attempt)

            return [[row(0, [1, 5]), row(1, [2, 8, 8, 8]), row(1, [3, 7], finished=False)] for _ in prompts]

    seen = []

    def judge(pairs: Sequence[tuple[int, str]]) -> list[Score]:
        seen.extend(pairs)
        return [judged(i, text) for i, text in pairs]

    scores, records = _evaluate(Rows(), [Prompt([100])], greedy=False, judge=judge, samples=2)
    assert seen == [(0, "5"), (0, "7")] and scores["pass@1"] == 0.5 and scores["pass@2"] == 1.0
    assert (scores["tokens"], scores["cut_off"], scores["entropy"]) == ((1 + 3 + 1) / 2, 0.5, 0.5)
    assert [record["transcript"] for record in records] == ["1 5", "3 7"]
    assert [record.get("earlier_rows") for record in records] == [None, ["2 8 8 8"]]


def test_no_problems_is_refused() -> None:
    with pytest.raises(ValueError, match="no problems"):
        _evaluate(Scripted(), [])
