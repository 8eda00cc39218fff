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


def _evaluate(generator: Scripted, prompts: list[Prompt]) -> tuple[dict, list[dict]]:
    return evaluate_problems(
        generator,
        prompts,
        decode=lambda ids: " ".join(map(str, ids)),
        judge=lambda pairs: [judged(i, text) for i, text in pairs],
        classes=lambda texts: [None if text == "9" else int(text) for text in texts],
        samples=4,
        sampling=Sampling(max_new_tokens=3, num_samples=99, temperature=0.7, stop_ids=(2,)),
    )


def test_scores_by_hand() -> None:
    # right samples 3, 1, 0 of 4: pass@1 = (3/4 + 1/4 + 0) / 3; two problems have one: pass@4 = 2/3;
    # entropy (29 + 26 + 10) / 12 tokens / 8, of the sampled ones alone;
    # majorities 7 (gold), 6 (gold 5), 1 (gold 9): 1/3; greedy 7, 6, 1: 1/3
    generator = Scripted()
    scores, records = _evaluate(generator, [Prompt([100 + i], seed=i) for i in range(3)])
    assert scores == pytest.approx(
        {"pass@1": 1 / 3, "pass@4": 2 / 3, "maj@4": 1 / 3, "greedy": 1 / 3, "entropy": 65 / 12 / 8}
        | {"problems": 3, "reward_errors": 1}
    )
    assert [(r.temperature, r.num_samples, r.stop_ids) for r in generator.requests] == [(0.0, 1, (2,)), (0.7, 4, (2,))]
    assert [r["greedy"] for r in records] == [True] * 3 + [False] * 12
    assert records[1] == {"problem": 1, "prompt": "101", "completion": "6", "reward": 0.1, "greedy": True}
    assert records[3 + 4]["completion"] == "5" and records[3 + 4]["reward"] == 1.0


def test_no_problems_is_refused() -> None:
    with pytest.raises(ValueError, match="no problems"):
        _evaluate(Scripted(), [])
