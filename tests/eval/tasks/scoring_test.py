"""Scores of tasks: gold answers are right, wrong ones are not, and a program must run to its end."""

from __future__ import annotations

import pytest

from llmtrain.config.tasks import EvalTask, TaskData, read_task
from llmtrain.data.faults import Faults
from llmtrain.data.files import read_rows
from llmtrain.eval.tasks.problems import Problem, read_problems
from llmtrain.eval.tasks.scoring import Judge
from llmtrain.rewards import Score
from tests.shared_data import shared_data

PROGRAM = "{{question}}{{completion}}\n\n{{test}}\n\ncheck({{entry_point}})\n"
CODE = EvalTask(name="c", score="code", extract="code", program=PROGRAM, deadline_s=0.5)
ROW = {
    "question": 'from typing import List\n\ndef top(x: List[int]) -> int:\n    """Returns the largest."""\n',
    "test": "def check(f):\n    assert f([1, 3, 2]) == 3\n    assert f([-1]) == -1\n",
    "entry_point": "top",
}


def values(task: EvalTask, problems: list[Problem], *completions: str) -> list[float]:
    return [score.value for score in Judge(task, problems).score([(0, text) for text in completions])]


def gsm8k(limit: int | None) -> tuple[float, float, Judge]:
    """Returns how many gold answers, and how many wrong ones, of the test set's first problems are called right."""
    path = str(shared_data("gsm8k/test.jsonl"))
    task = read_task(EvalTask(task="gsm8k", data=TaskData(path=path), limit=limit), "eval.tasks.0")
    problems = read_problems(task, 0)
    rows = [row for _, row in read_rows(path, Faults(path))][:limit]
    assert len(problems) == len(rows) and problems[0].prompt.endswith("farmers' market?\nAnswer:")
    golds = [row["answer"].rpartition("#### ")[2].replace(",", "") for row in rows]
    right = [(i, " " + row["answer"]) for i, row in enumerate(rows)]
    wrong = [(i, f" so\n#### {int(gold) + 1}\n\nQuestion: x\n#### {gold}") for i, gold in enumerate(golds)]
    judge = Judge(task, problems)
    return *(sum(score.value for score in judge.score(pairs)) for pairs in (right, wrong)), judge


def test_gsm8k_calls_its_gold_answers_right() -> None:
    right, wrong, judge = gsm8k(40)
    assert (right, wrong) == (40, 0)
    assert judge.classes(["#### 7", "it is\n#### 7.0", "<think>7", "#### 8"]) == [0, 0, None, 1]


@pytest.mark.slow
def test_gsm8k_calls_all_its_gold_answers_right() -> None:
    assert gsm8k(None)[:2] == (1319, 0)


def test_math_reads_the_box_behind_the_reasoning() -> None:
    task = EvalTask(name="m", extract="boxed")
    problems = [Problem("a:1", {}, "q", "\\frac{1}{2}")]
    found = values(task, problems, "\\boxed{0.5}", "<think>\\boxed{0.5}", "1/2", "<think>3</think> \\boxed{3}")
    assert found == [1.0, 0.0, 0.0, 0.0]
    floats = [Problem("a:1", {}, "q", 142.0)]  # as AMC's answers are stored
    assert values(task, floats, "\\boxed{142}", "\\boxed{143}") == [1.0, 0.0]
    assert values(EvalTask(name="n", extract="hashes"), floats, "#### 142 apples", "142") == [1.0, 0.0]


def test_exact_matching() -> None:
    task = EvalTask(name="e", extract="whole", score="exact")
    problems = [Problem("a:1", {}, "q", "New  York")]
    assert values(task, problems, " New York\n", "new york", "") == [1.0, 0.0, 0.0]
    assert Judge(task, problems).classes(["a", " a", "", "b"]) == [0, 0, None, 1]
    letters = EvalTask(name="l", extract="letter", score="exact")
    row = {"choices": ["x", "y"], "answer": 1}
    assert values(letters, [Problem("a:1", row, "q", 1)], "The answer is (B)", "(A)") == [1.0, 0.0]
    with pytest.raises(ValueError, match=r"a:1: task e: the answer \[\] is no number or text"):
        Judge(task, [Problem("a:1", {}, "q", [])])


def test_code_runs_against_the_tests_of_its_row() -> None:
    found = values(
        CODE,
        [Problem("a:1", ROW, "q", None)],
        "    return max(x)\n",
        "Here it is:\n```python\ndef top(x):\n    return sorted(x)[-1]\n```\n",
        "    return x[1]\n",
        "    return max(x\n",
        "    raise SystemExit(0)\n",
        "    import os\n    os._exit(0)\n",
        "    pass\nimport sys\nprint(*sys._getframe().f_code.co_consts, sep='\\n')\nsys.exit(0)\n",
        "    print('x' * 70_000)\n    return max(x)\n",
        "    while True:\n        pass\n",
        "",
    )
    assert found == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0]
    with pytest.raises(ValueError, match=r"a:1: task c: the template .* reads test; found"):
        Judge(CODE, [Problem("a:1", {"question": "", "entry_point": "f"}, "q", None)])


def test_generated_problems_have_their_own_scorer() -> None:
    task = read_task(EvalTask(task="chain_sum", limit=3), "eval.tasks.0")
    problems = read_problems(task, 0)
    golds = [problem.values["answer"] for problem in problems]
    pairs = [(i, f"<answer>{gold}</answer>") for i, gold in enumerate(golds)]
    judge = Judge(task, problems)
    assert [s.value for s in judge.score(pairs)] == [1.0] * 3
    assert [s.value for s in judge.score([(i, f"<answer>{int(g) + 1}</answer>") for i, g in enumerate(golds)])] == [
        0.0
    ] * 3


def test_rows_that_cannot_be_scored_are_named() -> None:
    with pytest.raises(ValueError, match=r"a:7: reward math: field 'answer' is \[1\]"):
        Judge(EvalTask(name="m"), [Problem("a:7", {}, "q", [1])])


def test_a_pattern_that_takes_too_long_is_an_error_of_the_scorer() -> None:
    task = EvalTask(name="p", extract="regex", pattern=r"(?:a|aa)+$", score="exact", deadline_s=0.05)
    judge = Judge(task, [Problem("a:1", {}, "q", "aaa")])
    late = "a" * 60 + "b"
    assert judge.score([(0, "aaa"), (0, late), (0, "b")]) == [
        Score(1.0),
        Score(0.0, "pattern: took longer than 0.05 s"),
        Score(0.0),
    ]
    assert judge.answer(late) is None and judge.classes([late, "aaa"]) == [None, 0]
