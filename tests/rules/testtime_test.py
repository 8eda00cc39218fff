"""What is said of `eval.test_time` that cannot be, and that what can be is let through."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llmtrain.config.load import load
from llmtrain.rules.check import violations

DOCUMENT = """
train: {seq_len: 128}
rollout: {max_new_tokens: 64}
rewards: [{name: math}, {name: first_integer}]
eval: {text: false, test_time: {methods: [majority, best_of, budget, search], budget: {budgets: [32, 48]}}}
"""


def told(folder: Path, *overrides: str, command: str = "eval") -> list[str]:
    (folder / "x.yaml").write_text(DOCUMENT)
    found = violations(load(str(folder / "x.yaml"), list(overrides)), 1, command)
    return [line for line in found if line.startswith("eval.test_time")]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("eval.problems=0", "eval.test_time: needs problems, and eval.problems=0; raise it"),
        (
            "eval.test_time.scores=[rm]",
            "eval.test_time.scores=rm: must be logprob or the name of one of rewards, which",
        ),
        ("eval.test_time.search.score=rm", "eval.test_time.search.score=rm: must be logprob or .* math, first_integer"),
        (
            "eval.test_time.search.read=step",
            "eval.test_time.search.read=step: reads a reward model .* score=logprob is",
        ),
        ("eval.test_time.search.width=3", "eval.test_time.search.candidates=4: must be a multiple of width=3"),
        (
            "eval.test_time.budget.budgets=[8, 64]",
            "eval.test_time.budget.budgets=64: with answer_tokens=64 .* than 128",
        ),
        ("eval.test_time.budget.samples=2", "eval.test_time.budget.samples=2: are all the same with temperature=0"),
        ("eval.test_time.methods=[search, search]", "eval.test_time.methods=search: must not stand there twice"),
        ("eval.test_time.budget.waits=[1, 1]", "eval.test_time.budget.waits=1: must not stand there twice"),
    ],
)
def test_what_cannot_be_is_told(tmp_path: Path, override: str, expected: str) -> None:
    (line,) = told(tmp_path, override)
    assert re.match(expected, line), line


def test_a_wait_needs_an_end_of_thinking(tmp_path: Path) -> None:
    (line,) = told(tmp_path, "eval.test_time.budget.waits=[0, 2]", "eval.test_time.budget.end=null")
    assert line.startswith("eval.test_time.budget.waits=2: a wait stands in place of the end of thinking, and end=null")


def test_budgets_end_at_the_positions_of_the_model(tmp_path: Path) -> None:
    (line,) = told(tmp_path, "model.max_positions=100")
    assert line.startswith("eval.test_time.budget.budgets=48: with answer_tokens=64 must be less than 100")


def test_what_can_be_is_let_through(tmp_path: Path) -> None:
    assert told(tmp_path) == []
    assert told(tmp_path, "eval.test_time.scores=[logprob, math]", "eval.test_time.budget.waits=[0, 1]") == []
    assert told(tmp_path, "eval.test_time.scores=[rm]", command="sft") == []  # it is eval's alone
    model = "rewards=[{name: math}, {model: /rm, name: rm}]"
    assert told(tmp_path, model, "eval.test_time.search.score=rm", "eval.test_time.search.read=step") == []
