from __future__ import annotations

from types import SimpleNamespace

import pytest

from llmtrain.commands import testtime
from llmtrain.config.schema import Config
from llmtrain.eval.testtime.problems import Problems, Written
from llmtrain.types import Prompt

CONFIG = Config(rewards=[{"name": "math"}, {"model": "/rm", "name": "rm", "batch_tokens": 64}])
PROBLEMS = Problems([Prompt([4, 5])], [{}], str, lambda pairs: [], lambda texts: [])


def _tokenizer(fingerprint: str) -> SimpleNamespace:
    return SimpleNamespace(fingerprint=fingerprint)


def test_what_scores_has_the_kind_of_its_weights() -> None:
    kinds = [testtime.graded_by(CONFIG, _tokenizer("a"), PROBLEMS, name).kind for name in ("logprob", "math", "rm")]
    assert kinds == ["logprob", "reward", "model"]


def test_a_process_reward_model_needs_the_tokenizer_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(testtime, "load_tokenizer", lambda path: _tokenizer("b"))
    with pytest.raises(ValueError, match="read=step: the tokenizer of /rm is not that of the model"):
        testtime.graded_by(CONFIG, _tokenizer("a"), PROBLEMS, "rm", "step")


def test_a_process_reward_model_reads_prompt_and_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[list[int]], int]] = []

    def scores(rows: list[list[int]], batch_tokens: int) -> list[float]:
        asked.append((rows, batch_tokens))
        return [0.25 for _ in rows]

    monkeypatch.setattr(testtime, "load_tokenizer", lambda path: _tokenizer("a"))
    model = SimpleNamespace(scores=scores, most_tokens=None)
    monkeypatch.setattr("llmtrain.rewards.model.classifier_of", lambda *where: model)
    grade = testtime.graded_by(CONFIG, _tokenizer("a"), PROBLEMS, "rm", "step").grade
    assert grade([Written(0, [7, 8])]) == [0.25] and asked == [([[4, 5, 7, 8]], 64)]
