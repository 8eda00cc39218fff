"""Prompts as the model gets them: examples, chain of thought, chats, options, and rows that do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmtrain.config.tasks import EvalTask, TaskData
from llmtrain.data.tokenizer import Tokenizer, load_tokenizer
from llmtrain.eval.tasks.problems import encode_problems, read_problems
from llmtrain.eval.tasks.show import shown

ROWS = [{"question": f"{i}+{i}?", "answer": f"twice\n#### {2 * i}", "worked": f"{i} and {i}"} for i in range(1, 6)]


@pytest.fixture(scope="module")
def tokenizer(small_data: Path) -> Tokenizer:
    return load_tokenizer(str(small_data / "tokenizer"))


@pytest.fixture
def task(tmp_path: Path) -> EvalTask:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return EvalTask(name="t", data=TaskData(path=str(path)), prompt="Q: {{question}}\nA:")


def changed(task: EvalTask, **keys: object) -> EvalTask:
    return task.model_copy(update=keys)


def test_a_prompt_without_examples(task: EvalTask) -> None:
    problems = read_problems(changed(task, limit=2), 0)
    assert [p.prompt for p in problems] == ["Q: 1+1?\nA:", "Q: 2+2?\nA:"]
    assert [p.gold for p in problems] == ["twice\n#### 2", "twice\n#### 4"]
    assert problems[1].where.endswith("rows.jsonl:2")


def test_worked_examples_written_out(task: EvalTask) -> None:
    examples = [{"question": "0+7?", "worked": "<<7>>7 stays\n#### 7"}, {"question": "3+3?", "worked": "6"}]
    few = changed(task, few_shot=1, thinking="worked", examples=examples, worked='{{worked | without("<<.*?>>")}}')
    assert read_problems(few, 0)[0].prompt == "Q: 0+7?\nA: 7 stays\n#### 7\n\nQ: 1+1?\nA:"
    with pytest.raises(ValueError, match=r"rows.jsonl:3: task t: few_shot=2: only 1 examples ask something else"):
        read_problems(changed(few, few_shot=2), 0)


def test_a_problem_is_never_its_own_example(task: EvalTask) -> None:
    few = changed(task, few_shot=4, solution="{{worked}}")
    for problem in read_problems(few, 3):
        parts = problem.prompt.split("\n\n")
        assert len(parts) == 5 and sum(part.startswith(parts[-1]) for part in parts) == 1
        assert all(f"A: {part[3]} and {part[3]}" in part for part in parts[:-1])
    assert [p.prompt for p in read_problems(few, 3)] == [p.prompt for p in read_problems(few, 3)]
    with pytest.raises(ValueError, match=r"few_shot=5: there are only 5 rows in the problems themselves"):
        read_problems(changed(task, few_shot=5), 3)


def test_think_step_by_step(task: EvalTask) -> None:
    zero = changed(task, prompt="{{question}} {{think}}", thinking="zero_shot")
    assert read_problems(zero, 0)[0].prompt == "1+1? Let's think step by step."
    assert read_problems(changed(zero, thinking="none"), 0)[0].prompt == "1+1? "


def test_missing_columns_name_row_and_columns(task: EvalTask) -> None:
    with pytest.raises(ValueError) as caught:
        read_problems(changed(task, prompt="{{frage}}", limit=2), 0)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3 and "rows.jsonl:1: task t: the template '{{frage}}' reads frage; found" in lines[0]
    assert "question, answer, worked" in lines[0]
    with pytest.raises(ValueError, match=r"missing 'gold', which `fields` names; found 'question', 'answer', 'worked'"):
        read_problems(changed(task, fields={"answer": "gold"}), 0)
    with pytest.raises(ValueError, match=r"rows.jsonl:1: task t: the template .* cannot be filled in"):
        read_problems(changed(task, prompt="{{question + 1}}"), 0)


def test_a_null_is_no_text(task: EvalTask, tmp_path: Path) -> None:
    (tmp_path / "null.jsonl").write_text('{"question": null, "problem": "p", "hint": null, "answer": "1"}\n')
    nulls = changed(task, data=TaskData(path=str(tmp_path / "null.jsonl")))
    assert read_problems(nulls, 0)[0].prompt == "Q: p\nA:"  # the alias that is not null
    for prompt, fields, told in (
        ("{{hint}} {{question}}", {}, r"cannot be filled in \(a value is null\)"),
        ("{{question}}", {"question": "hint"}, "reads question"),
        ("{{question}}", {"question": "problm"}, "reads question"),  # though there is a column of that name
    ):
        with pytest.raises(ValueError, match=told):
            read_problems(changed(nulls, prompt=prompt, fields=fields), 0)
    assert read_problems(changed(nulls, prompt="{{hint or 'none'}}"), 0)[0].prompt == "none"


def test_tokens_and_show(task: EvalTask, tokenizer: Tokenizer) -> None:
    problems = read_problems(task, 0)
    encode_problems(changed(task, max_new_tokens=8), problems, tokenizer, 64)
    assert all(tokenizer.decode(p.ids) == p.prompt for p in problems)
    lines = list(shown(task, problems, tokenizer))
    assert lines[0] == "== t: 5 problems, generate, few_shot 0, thinking none, plain text"
    assert lines[3].endswith(f"rows.jsonl:1), {len(problems[0].ids)} tokens") and lines[4] == "Q: 1+1?\nA:"
    assert lines[5] == "-- answer: twice\n#### 2" and len(lines) == 9


def test_what_does_not_fit_is_told_for_every_row(task: EvalTask, tokenizer: Tokenizer) -> None:
    problems = read_problems(task, 0)
    with pytest.raises(ValueError) as caught:
        encode_problems(task, problems, tokenizer, 64)
    lines = str(caught.value).splitlines()
    assert len(lines) == 6 and lines[-1] == "t: 5 faults"
    assert "with 512 of max_new_tokens it is longer than model.max_positions=64; lower few_shot" in lines[0]


def test_a_chat_shows_examples_as_turns(task: EvalTask) -> None:
    keys = {"chat": True, "system": "Be brief.", "few_shot": 1, "solution": " {{worked}}", "max_new_tokens": 4}
    chat = changed(task, examples=[{"question": "0+7?", "worked": "7"}], **keys)
    problems = read_problems(chat, 0)
    assert [turn["role"] for turn in problems[0].prompt] == ["system", "user", "assistant", "user"]
    assert [turn["content"] for turn in problems[0].prompt][1:3] == ["Q: 0+7?\nA:", "7"]
    assert [p.gold for p in problems] == [row["answer"] for row in ROWS]


def test_options(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [
        {"question": "Sky?", "choices": {"text": ["red", "blue"], "label": ["A", "B"]}, "answerKey": "B"},
        {"question": "Sea?", "choices": {"text": ["wet", "dry", "hot"], "label": ["1", "2", "3"]}, "answerKey": "1"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = EvalTask(
        name="o", kind="options", data=TaskData(path=str(path)), prompt="{{question}} ", option="{{choice}}"
    )
    problems = read_problems(task, 0)
    assert [p.gold for p in problems] == [1, 0] and problems[1].options == [" wet", " dry", " hot"]
    encode_problems(task, problems, tokenizer, 64)
    for problem in problems:
        assert [tokenizer.decode(b) for _, b in problem.option_ids] == problem.options
        assert all(a == problem.ids for a, _ in problem.option_ids)
    few = task.model_copy(update={"few_shot": 1})
    assert read_problems(few, 0)[0].prompt == "Sea? wet\n\nSky?"
    listed = "{{question}}\n{% for c in choices %}{{letters[loop.index0]}}. {{c}}\n{% endfor %}Answer:"
    lettered = task.model_copy(update={"prompt": listed, "option": " {{letter}}"})
    first = read_problems(lettered, 0)[0]
    assert first.prompt == "Sky?\nA. red\nB. blue\nAnswer:" and first.options == [" A", " B"]
