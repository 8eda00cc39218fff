"""Passages of a store in the prompts of a task."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmtrain.cli import main
from llmtrain.commands.tasks import task_scores
from llmtrain.config.document import ConfigError
from llmtrain.config.tasks import EvalTask, TaskData, read_task
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.eval.tasks.passages import told
from llmtrain.eval.tasks.problems import encode_problems, read_problems
from llmtrain.eval.tasks.show import shown

pytest.importorskip("bm25s", reason="the extra `search` installs it")

ROWS = [
    {"question": "What colour is the sky?", "topic": "grass", "answer": "blue"},
    {"question": "And zebras?", "topic": "sky", "answer": "striped"},
]
PROMPT = "{{passages}}\n\nQ: {{question}}\nA:"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("passages")
    texts = ["The sky is blue.", "Grass is green.", "A sky of another colour: the evening sky is red."]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    (folder / "index.yaml").write_text(f"run_dir: {folder}\nindex: {{documents: [{folder}/rows.jsonl]}}\n")
    assert main(["index", str(folder / "index.yaml")]) == 0
    return str(folder / "store")


def task_of(folder: Path, **keys: object) -> EvalTask:
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    data = TaskData(path=str(folder / "rows.jsonl"))
    return EvalTask.model_validate({"name": "t", "data": data, "prompt": PROMPT, **keys})


def test_what_is_found_for_the_question_stands_in_the_prompt(tmp_path: Path, store: str) -> None:
    first, second = read_problems(task_of(tmp_path, context={"store": store, "k": 2}), 0)
    # "colour" stands in the third passage alone, and "sky" twice
    found = "A sky of another colour: the evening sky is red.\n\nThe sky is blue."
    assert first.prompt == f"{found}\n\nQ: What colour is the sky?\nA:"
    assert second.prompt == "\n\nQ: And zebras?\nA:" and second.passages == []
    rows = str(Path(store).parent / "rows.jsonl")
    sources = [f"{rows}:3, characters 0 to 48", f"{rows}:1, characters 0 to 16"]
    assert [each["source"] for each in told(first.passages)] == sources
    assert first.passages[0].score > first.passages[1].score > 0


def test_what_is_searched_for_is_a_template(tmp_path: Path, store: str) -> None:
    context = {"store": store, "k": 1, "query": "{{topic}} green"}
    first, second = read_problems(task_of(tmp_path, context=context), 0)
    assert first.prompt.startswith("Grass is green.\n") and second.prompt.startswith("Grass is green.\n")
    with pytest.raises(ValueError, match=r"rows.jsonl:1: task t: the template '\{\{subject\}\}' reads subject"):
        read_problems(task_of(tmp_path, context={**context, "query": "{{subject}}"}), 0)


def test_examples_have_passages_of_their_own(tmp_path: Path, store: str) -> None:
    examples = [{"question": "Is grass green?", "answer": "yes"}]
    task = task_of(tmp_path, context={"store": store, "k": 1}, few_shot=1, examples=examples)
    assert read_problems(task, 0)[0].prompt == (
        "Grass is green.\n\nQ: Is grass green?\nA: yes\n\n"
        "A sky of another colour: the evening sky is red.\n\nQ: What colour is the sky?\nA:"
    )


def test_they_are_shown_and_recorded_with_their_sources(tmp_path: Path, store: str, small_data: Path) -> None:
    tokenizer = load_tokenizer(str(small_data / "tokenizer"))
    task = task_of(tmp_path, context={"store": store, "k": 1})
    problems = read_problems(task, 0)
    encode_problems(task, problems, tokenizer, 4096)
    lines = "\n".join(shown(task, problems, tokenizer))
    assert "the evening sky is red.\n\nQ: What colour is the sky?" in lines
    assert f"-- passage 1, score {problems[0].passages[0].score:.4g}: " in lines and "rows.jsonl:3, characters" in lines
    with pytest.raises(ValueError, match=r"lower few_shot, context.k or max_new_tokens"):
        encode_problems(task, problems, tokenizer, 520)


def test_records_name_the_passages(tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of(tmp_path, context={"store": store, "k": 1})
    problems = read_problems(task, 0)
    records = [{"problem": 0, "completion": "red"}, {"problem": 1, "completion": "x"}]
    monkeypatch.setattr("llmtrain.commands.tasks.task_score", lambda *_: ({}, records))
    _, (first, second) = task_scores(None, [(task, problems)], [None], None, None, None)
    assert first["passages"] == told(problems[0].passages) and "passages" not in second


def test_a_prompt_that_shows_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text("prompt: 'Q: {{question}}'\ndata: {path: x}\ncontext: {store: x}\n")
    with pytest.raises(ConfigError, match=r"task.yaml:3: context: the prompt has no \{\{passages\}\}"):
        read_task(EvalTask(file=str(tmp_path / "task.yaml")), "eval.tasks.0")
