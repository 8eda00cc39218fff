"""Rows with the columns of published sets, and rows that lack what a task needs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmtrain.config.tasks import EvalTask, TaskData
from llmtrain.eval.tasks.rows import Fields, examples_of, options_of, right_option, rows_of

PUBLISHED = [  # (columns as the sets have them, question, answer)
    ({"question": "q", "answer": "4\n#### 4"}, "q", "4\n#### 4"),
    ({"problem": "q", "solution": "so \\boxed{4}", "answer": "4"}, "q", "4"),
    ({"id": 1, "problem": "q", "answer": 33.0, "url": "u"}, "q", 33.0),
    ({"problem": "q", "solution": "so \\boxed{4}"}, "q", "so \\boxed{4}"),
    ({"question": "q", "answer": None, "answer_number": 18}, "q", 18),
    ({"prompt": "def f():", "canonical_solution": "  return 1", "test": "t"}, "def f():", "  return 1"),
    ({"ctx": "A man", "endings": ["a", "b"], "label": "1"}, "A man", "1"),
    ({"question": "q", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "A"}, "q", "A"),
]


@pytest.mark.parametrize(("row", "question", "answer"), PUBLISHED)
def test_columns_of_published_sets(row: dict, question: str, answer: object) -> None:
    fields = Fields({})
    assert fields.get(row, "question") == question and fields.get(row, "answer") == answer


def test_a_missing_column_names_those_that_there_are() -> None:
    told = r"missing 'question' or 'problem' .*fields: \{question: ...\}; found 'frage', 'antwort' \(null\)"
    with pytest.raises(ValueError, match=told):
        Fields({}).get({"frage": "q", "antwort": None}, "question")
    with pytest.raises(ValueError, match=r"missing 'frage', which `fields` names; found 'question'"):
        Fields({"question": "frage"}).get({"question": "q"}, "question")
    assert Fields({"question": "frage"}).get({"question": "no", "frage": "q"}, "question") == "q"


@pytest.mark.parametrize(
    ("answer", "labels", "first", "right"),
    [
        ("B", ["A", "B", "C"], 0, 1),
        ("2", ["1", "2", "3"], 0, 1),  # a label of ARC, not a number from 0
        ("2", ["A", "B", "C"], 0, 2),  # of HellaSwag
        (2, ["A", "B", "C"], 1, 1),
        (1.0, ["A", "B", "C"], 0, 1),
        ("c", ["A", "B", "C"], 0, 2),
        ("two", ["A", "B", "C"], 0, 1),
        ("7", ["A", "B", "C"], 0, 3),  # no number of an option, but its text
        (2, ["1", "2", "3"], 0, 1),  # a label too
        (2.0, ["1", "2", "3"], 0, 1),
        ("two", ["A", "B", "C"], None, 1),
    ],
)
def test_the_right_option(answer: object, labels: list[str], first: int, right: int) -> None:
    assert right_option(answer, ["one", "two", "three", "7"], labels, first) == right


@pytest.mark.parametrize("answer", ["D", 3, "-1", "four", True, None, 1.5])
def test_an_answer_that_is_no_option(answer: object) -> None:
    with pytest.raises(ValueError, match=r"names none of the 3 options A, B, C"):
        right_option(answer, ["one", "two", "three"], ["A", "B", "C"], 0)


def test_a_number_and_a_text_are_told_apart() -> None:
    texts, labels = ["2", "3", "4"], ["A", "B", "C"]
    with pytest.raises(ValueError, match=r"'2' is the number of the option '4' and the text of another; .*null"):
        right_option("2", texts, labels, 0)
    assert right_option("2", texts, labels, None) == 0
    assert right_option(2, texts, labels, 0) == 2 and right_option("1", ["0", "1"], labels[:2], 0) == 1


def test_forms_of_choices() -> None:
    task = EvalTask(kind="options")
    assert options_of(task, {"choices": {"text": ["x", "y"], "label": ["1", "2"]}}, str) == (["x", "y"], ["1", "2"])
    assert options_of(task, {"options": {"A": "x", "B": "y"}}, str) == (["x", "y"], ["A", "B"])
    assert options_of(task, {"endings": ["x", "y"]}, str) == (["x", "y"], ["A", "B"])
    own = EvalTask(kind="options", choices=["no", "{{b}}"])
    assert options_of(own, {}, lambda text: text.replace("{{b}}", "yes")) == (["no", "yes"], ["A", "B"])
    empty: list = [{"text": None, "label": ["A"]}, {"text": 5, "label": 6}]
    for broken in ("xy", ["x"], ["x", ""], ["x", 3], *empty):
        with pytest.raises(ValueError, match=r"must be two or more texts"):
            options_of(task, {"choices": broken}, str)
    with pytest.raises(ValueError, match=r"2 texts and 0 labels"):
        options_of(task, {"choices": {"text": ["x", "y"], "label": None}}, str)
    with pytest.raises(ValueError, match=r"the choices are 27: at most 26 have a letter"):
        options_of(task, {"choices": ["x"] * 27}, str)
    with pytest.raises(ValueError, match=r"missing 'choices' or 'options' or 'endings'.*found 'question'"):
        options_of(task, {"question": "q"}, str)


def test_rows_of_a_generator_can_be_scored() -> None:
    rows = rows_of(TaskData(generator="chain_sum", size=3, seed=5), 2)
    assert [where for where, _ in rows] == ["chain_sum:1", "chain_sum:2"]
    assert rows[0][1]["source"] == "chain_sum" and rows[0][1]["entry"]["answer"] == rows[0][1]["answer"]
    assert rows == rows_of(TaskData(generator="chain_sum", size=3, seed=5))[:2]
    with pytest.raises(ValueError, match=r"data.generator=chain_sums: reasoning-gym refuses it"):
        rows_of(TaskData(generator="chain_sums"))
    with pytest.raises(ValueError, match=r"refuses it .*min_term"):
        rows_of(TaskData(generator="chain_sum", settings={"min_term": 1}))


def test_examples_are_seeded(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"question": str(i), "answer": i}) + "\n" for i in range(20)))
    task = EvalTask(name="t", few_shot=3, examples_from=TaskData(path=str(path)))
    first = [row["answer"] for _, row in examples_of(task, [], 1)]
    assert sorted(first) == list(range(20)) and first != list(range(20))
    assert first == [row["answer"] for _, row in examples_of(task, [], 1)]
    assert first != [row["answer"] for _, row in examples_of(task, [], 2)]
    with pytest.raises(ValueError, match=r"t: few_shot=21: there are only 20 rows in .*train.jsonl"):
        examples_of(task.model_copy(update={"few_shot": 21}), [], 1)
    with pytest.raises(ValueError, match=r"only 2 rows in the problems themselves"):
        examples_of(EvalTask(name="t", few_shot=2), [("a:1", {}), ("a:2", {})], 1)
